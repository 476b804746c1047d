//! `cargo xtask test`: everything that has to hold, in steps that can be chosen.

use crate::c;
use crate::inline;
use crate::tool::{Result, cargo, run as run_command};
use std::time::Instant;

/// What a step reports besides success: what it did, and what it could not do here.
#[derive(Default)]
pub struct Report {
    pub done: String,
    pub skipped: Vec<String>,
}

impl Report {
    /// Notes on the terminal, and again in the summary, what this machine cannot check.
    pub fn skip(&mut self, what: String) {
        println!("skipped: {what}");
        if !self.skipped.contains(&what) {
            self.skipped.push(what);
        }
    }
}

/// A step, by the name that selects it.
pub struct Step {
    name: &'static str,
    run: fn() -> Result<Report>,
}

/// In the order in which they run: what is quick and fails most often comes first,
/// and the header before anything that would write it anew.
const STEPS: [Step; 8] = [
    Step { name: "header", run: header },
    Step { name: "fmt", run: || cargo_step(&["fmt", "--all", "--", "--check"]) },
    Step { name: "clippy", run: clippy },
    Step { name: "docs", run: docs },
    Step { name: "rust", run: || cargo_step(&["test", "--workspace"]) },
    Step { name: "inline", run: inline::check },
    Step { name: "c", run: c::tests },
    Step { name: "examples", run: c::examples },
];

/// The steps of these names; all of them if there are none.
pub fn parse(names: &[&str]) -> Result<Vec<&'static Step>> {
    let known: Vec<&str> = STEPS.iter().map(|step| step.name).collect();
    if let Some(name) = names.iter().find(|name| !known.contains(name)) {
        return Err(format!("no step is called {name}"));
    }
    Ok(STEPS.iter().filter(|step| names.is_empty() || names.contains(&step.name)).collect())
}

/// Runs the steps up to the first that fails.
pub fn run(steps: &[&Step]) -> Result {
    let mut summary: Vec<(&str, Report, f64)> = Vec::new();
    for step in steps {
        println!("== {}", step.name);
        let start = Instant::now();
        let report = (step.run)().map_err(|message| {
            let passed: Vec<&str> = summary.iter().map(|(name, ..)| *name).collect();
            let passed = if passed.is_empty() { "nothing".to_string() } else { passed.join(", ") };
            format!("step {} {message}\n\npassed before it: {passed}", step.name)
        })?;
        summary.push((step.name, report, start.elapsed().as_secs_f64()));
        println!();
    }
    println!("== summary");
    for (name, report, seconds) in &summary {
        println!("{}", format!("{name:<9} ok  {seconds:6.1} s  {}", report.done).trim_end());
        for what in &report.skipped {
            println!("{:<9} skipped: {what}", "");
        }
    }
    println!("all {} steps passed", summary.len());
    Ok(())
}

fn cargo_step(arguments: &[&str]) -> Result<Report> {
    run_command(&mut cargo(arguments))?;
    Ok(Report::default())
}

/// build.rs writes include/xent.h; told to check, it fails where it would have
/// to change it.
fn header() -> Result<Report> {
    let words = ["check", "--package", "xent", "--features", "header"];
    run_command(cargo(words).env("XENT_CHECK_HEADER", "1"))?;
    Ok(Report::default())
}

/// With the C interface, and the library once more as a Rust dependent compiles it.
fn clippy() -> Result<Report> {
    let all = ["clippy", "--workspace", "--all-targets", "--features", "xent/capi"];
    run_command(cargo(all).args(["--", "-D", "warnings"]))?;
    cargo_step(&["clippy", "--package", "xent", "--", "-D", "warnings"])
}

fn docs() -> Result<Report> {
    run_command(
        cargo(["doc", "--no-deps", "--workspace", "--features", "xent/capi"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    Ok(Report::default())
}
