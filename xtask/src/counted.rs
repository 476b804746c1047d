//! `cargo xtask counted`: instructions an element, counted by callgrind and compared with
//! `benches/counted.txt`. Unlike a time, a count is the same on every run and every machine.

use crate::tool::{self, Result, cargo, executables, make_directory, root, shown, target};
use std::fs;
use std::path::Path;
use std::process::Command;

/// The figures that hold.
const RECORD: &str = "benches/counted.txt";

/// What `benches/counted/src/main.rs` names the function to count in.
const SYMBOL: &str = "xent_counted_call";

/// How far a count may lie from its record: 3 %, and 15 % with another compiler than the record's,
/// since that schedules and unrolls as it likes.
const TOLERANCE: [f64; 2] = [0.03, 0.15];

/// A count: the name of the call, and instructions an element (or a call).
type Count = (String, f64);

/// `cargo xtask counted [--record]`.
pub fn run(record: bool) -> Result {
    if let Some(reason) = impossible() {
        println!("skipped: counted: {reason}");
        return Ok(());
    }
    let counts = count()?;
    let compiler = tool::output(Command::new("rustc").arg("--version").current_dir(root()))?;
    let compiler = compiler.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    let path = root().join(RECORD);
    if record {
        let lines: String =
            counts.iter().map(|(name, count)| format!("{count:9.3}  {name}\n")).collect();
        let text = format!(
            "# Instructions an element with AVX2 on one thread (of 1x10: a call), by callgrind.\n\
             # `cargo xtask counted` compares, `cargo xtask counted --record` writes this file.\n\
             # {compiler}\n{lines}"
        );
        fs::write(&path, text).map_err(|error| format!("cannot write {RECORD}: {error}"))?;
        println!("recorded {} counts in {RECORD}", counts.len());
        return Ok(());
    }
    let text =
        fs::read_to_string(&path).map_err(|error| format!("cannot read {RECORD}: {error}"))?;
    let (recorded_with, recorded) = parse(&text)?;
    let same = compiler == recorded_with;
    let tolerance = TOLERANCE[usize::from(!same)];
    if !same {
        println!("{RECORD} is of {recorded_with}, this is {compiler}: {tolerance} is tolerated");
    }
    let verdict = compare(&counts, &recorded, tolerance)?;
    println!("{verdict}");
    Ok(())
}

/// Why nothing can be counted here.
fn impossible() -> Option<&'static str> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        return Some("valgrind not found");
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return None;
    }
    Some("this processor has no AVX2")
}

/// Runs the bench under callgrind, which writes a file for each call.
fn count() -> Result<Vec<Count>> {
    // With the library as it ships, which may be there already.
    let mut build = cargo(["build", "--release", "--package", "xent-counted"]);
    let program = executables(&mut build)?.pop().ok_or("finds no program that counts")?;
    let directory = target().join("counted");
    let _ = fs::remove_dir_all(&directory);
    make_directory(&directory)?;
    let output = directory.join("calls");
    let names = tool::output(
        Command::new("valgrind")
            .args(["--tool=callgrind", "--quiet", "--collect-atstart=no"])
            .arg(format!("--toggle-collect={SYMBOL}"))
            .arg(format!("--dump-after={SYMBOL}"))
            .arg(format!("--callgrind-out-file={}", output.display()))
            .arg(program)
            .env("XENT_ISA", "avx2")
            .current_dir(root()),
    )?;
    let mut counts = Vec::new();
    for (i, line) in names.lines().enumerate() {
        let (elements, name) =
            line.split_once(' ').ok_or_else(|| format!("not a count: {line}"))?;
        let elements: f64 =
            elements.parse().map_err(|_| format!("not a number of elements: {line}"))?;
        counts.push((name.to_string(), total(&directory, i + 1)? / elements));
    }
    if counts.is_empty() { Err("counted nothing".to_string()) } else { Ok(counts) }
}

/// The instructions of the `number`th call.
fn total(directory: &Path, number: usize) -> Result<f64> {
    let path = directory.join(format!("calls.{number}"));
    let text = fs::read_to_string(&path)
        .map_err(|error| format!("cannot read {}: {error}", shown(&path)))?;
    text.lines()
        .find_map(|line| line.strip_prefix("totals: "))
        .and_then(|total| total.trim().parse().ok())
        .filter(|&total| total > 0.0)
        .ok_or_else(|| format!("finds no count in {}", shown(&path)))
}

/// The compiler and the counts of a record.
fn parse(text: &str) -> Result<(String, Vec<Count>)> {
    let mut compiler = String::new();
    let mut counts = Vec::new();
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            if comment.starts_with("rustc ") {
                compiler = comment.to_string();
            }
        } else if let Some((count, name)) = line.trim().split_once("  ") {
            let count = count.parse().map_err(|_| format!("{RECORD}: not a count: {line}"))?;
            counts.push((name.to_string(), count));
        }
    }
    Ok((compiler, counts))
}

/// What to say if every count is as recorded, or below; which are not, otherwise.
fn compare(counts: &[Count], recorded: &[Count], tolerance: f64) -> Result<String> {
    let (mut rises, mut drops) = (String::new(), String::new());
    for (name, count) in counts {
        let Some((_, was)) = recorded.iter().find(|(other, _)| other == name) else {
            rises += &format!("\n  {name}: not in {RECORD}");
            continue;
        };
        let line = format!("\n  {name}: {count:.3}, recorded {was:.3}");
        // Of a count near 0 the last digit that is written down is more than the tolerance.
        if *count > was * (1.0 + tolerance) + 0.001 {
            rises += &line;
        } else if *count < was * (1.0 - tolerance) - 0.001 {
            drops += &line;
        }
    }
    for (name, _) in recorded {
        if !counts.iter().any(|(other, _)| other == name) {
            rises += &format!("\n  {name}: recorded, and not counted any more");
        }
    }
    let hint = "`cargo xtask counted --record` writes the new figures";
    if !rises.is_empty() {
        return Err(format!("counts more instructions than before ({hint}):{rises}"));
    }
    let agree =
        format!("{} counts within {:.0} % of their record", counts.len(), tolerance * 100.0);
    Ok(if drops.is_empty() {
        agree
    } else {
        format!("fewer instructions than recorded: lower the figures ({hint}):{drops}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(figures: &[(&str, f64)]) -> Vec<Count> {
        figures.iter().map(|&(name, count)| (name.to_string(), count)).collect()
    }

    #[test]
    fn rises_and_missing_counts_fail_and_drops_are_told() {
        let text = "# Words.\n# rustc 1.95.0\n    4.000  f32 forward\n";
        let (compiler, recorded) = parse(text).unwrap();
        assert_eq!(compiler, "rustc 1.95.0");
        assert_eq!(recorded, counts(&[("f32 forward", 4.0)]));
        let verdict = |figures: &[(&str, f64)]| compare(&counts(figures), &recorded, 0.03);
        assert!(verdict(&[("f32 forward", 4.1)]).is_ok_and(|text| text.contains("within")));
        assert!(verdict(&[("f32 forward", 3.8)]).is_ok_and(|text| text.contains("lower")));
        assert!(verdict(&[("f32 forward", 4.2)]).is_err());
        assert!(verdict(&[("f32 forward", 4.0), ("f32 both", 1.0)]).is_err());
        assert!(verdict(&[]).is_err());
    }
}
