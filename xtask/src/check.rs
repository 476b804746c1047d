//! `cargo xtask test`: everything that has to hold, in steps that can be chosen.

use crate::c;
use crate::inline;
use crate::tool::{Result, shell};
use anyhow::{Context, ensure};
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

/// A step: the name that selects it, and what it does.
pub type Step = (&'static str, fn() -> Result<Report>);

/// In the order in which they run: what is quick and fails most often comes first.
const STEPS: [Step; 8] = [
    // build.rs writes include/xent.h; told to check, it fails where it would have to change it.
    ("header", || cargo("check --package xent --features header", [("XENT_CHECK_HEADER", "1")])),
    ("fmt", || cargo("fmt --all -- --check", [])),
    ("clippy", || {
        // With the C interface, and the library once more as a Rust dependent compiles it.
        let all =
            "clippy --workspace --all-targets --features xent/capi,xent/ndarray -- -D warnings";
        cargo(all, [])?;
        cargo("clippy --package xent -- -D warnings", [])
    }),
    ("docs", || {
        let words = "doc --no-deps --workspace --features xent/capi,xent/ndarray";
        cargo(words, [("RUSTDOCFLAGS", "-D warnings")])
    }),
    ("rust", || cargo("test --workspace --features xent/ndarray", [])),
    ("inline", inline::check),
    ("c", c::tests),
    ("examples", c::examples),
];

fn cargo<const N: usize>(words: &str, variables: [(&str, &str); N]) -> Result<Report> {
    shell()?.cmd("cargo").args(words.split(' ')).envs(variables).run()?;
    Ok(Report::default())
}

/// The steps of these names; all of them if there are none.
pub fn parse(names: &[&str]) -> Result<Vec<Step>> {
    for name in names {
        ensure!(STEPS.iter().any(|step| step.0 == *name), "no step is called {name}");
    }
    Ok(STEPS.into_iter().filter(|step| names.is_empty() || names.contains(&step.0)).collect())
}

/// Runs the steps up to the first that fails.
pub fn run(steps: &[Step]) -> Result {
    let mut summary: Vec<(&str, Report, f64)> = Vec::new();
    for (name, step) in steps {
        println!("== {name}");
        let start = Instant::now();
        let report = step().with_context(|| {
            let passed: Vec<&str> = summary.iter().map(|(name, ..)| *name).collect();
            format!("step {name} failed; passed before it: [{}]", passed.join(", "))
        })?;
        summary.push((name, report, start.elapsed().as_secs_f64()));
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
