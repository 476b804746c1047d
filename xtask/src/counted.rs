//! `cargo xtask counted`: instructions an element, counted by callgrind and compared with
//! `benches/counted.txt`. Unlike a time, a count is the same on every run and every machine.
//!
//! Home-made around callgrind: gungraun (formerly iai-callgrind) compares with the last run in the target directory,
//! where this has to compare with a committed record, and needs a runner installed in the same version.

use crate::tool::{Result, directory, has, has_avx2, output, shell, target};
use anyhow::{Context, bail, ensure};
use std::fmt::Write as _;
use xshell::{Shell, cmd};

/// The committed counts.
const RECORD: &str = "benches/counted.txt";

/// `benches/counted/src/main.rs` names the function to count in.
const SYMBOL: &str = "xent_counted_call";

/// How far a count may lie from its record: 3 %, and 15 % with another compiler than the record's,
/// since that schedules and unrolls as it likes.
const TOLERANCE: [f64; 2] = [0.03, 0.15];

/// The name of a call, and its instructions an element (or a call).
type Count = (String, f64);

/// `cargo xtask counted [--record]`.
pub fn run(record: bool) -> Result {
    let sh = shell()?;
    if !has_avx2() || !has(&sh, "valgrind") {
        println!("skipped: counted: needs valgrind and AVX2");
        return Ok(());
    }
    let counts = count(&sh)?;
    let compiler = output(cmd!(sh, "rustc --version"))?;
    let compiler = compiler.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    if record {
        let mut text = format!(
            "# Instructions an element with AVX2 on one thread (of 1x10: a call), by callgrind.\n\
             # `cargo xtask counted` compares, `cargo xtask counted --record` writes this file.\n\
             # {compiler}\n"
        );
        counts.iter().try_for_each(|(name, count)| writeln!(text, "{count:9.3}  {name}"))?;
        sh.write_file(RECORD, text)?;
        println!("recorded {} counts in {RECORD}", counts.len());
        return Ok(());
    }
    let text = sh.read_file(RECORD)?;
    let same = text.lines().any(|line| line == format!("# {compiler}"));
    if !same {
        println!("{RECORD} is not of {compiler}: {} is tolerated", TOLERANCE[1]);
    }
    println!("{}", compare(&counts, &parse(&text)?, TOLERANCE[usize::from(!same)])?);
    Ok(())
}

/// Runs the bench under callgrind, which writes a file for each call.
fn count(sh: &Shell) -> Result<Vec<Count>> {
    cmd!(sh, "cargo build --release --package xent-counted").run()?;
    sh.remove_path(target().join("counted"))?;
    let calls = directory("counted")?.join("calls");
    let program = target().join("release/counted");
    let file = format!("--callgrind-out-file={}", calls.display());
    let options = [format!("--toggle-collect={SYMBOL}"), format!("--dump-after={SYMBOL}"), file];
    let callgrind = cmd!(sh, "valgrind --tool=callgrind --quiet --collect-atstart=no {options...}");
    let names = callgrind.arg(program).env("XENT_ISA", "avx2");
    let mut counts = Vec::new();
    for (i, line) in output(names)?.lines().enumerate() {
        let (elements, name) =
            line.split_once(' ').with_context(|| format!("not a count: {line}"))?;
        let text = sh.read_file(calls.with_extension((i + 1).to_string()))?;
        let total = text.lines().find_map(|line| line.strip_prefix("totals: "));
        let total: f64 = total.context("callgrind wrote no total")?.trim().parse()?;
        ensure!(total > 0.0, "callgrind counted nothing of {name}");
        counts.push((name.to_string(), total / elements.parse::<f64>()?));
    }
    ensure!(!counts.is_empty(), "counted nothing");
    Ok(counts)
}

/// The counts of a record.
fn parse(text: &str) -> Result<Vec<Count>> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (count, name) = line.trim().split_once("  ").context("not a count")?;
            Ok((name.to_string(), count.parse()?))
        })
        .collect()
}

/// The verdict if no count is above its record; an error that names those that are, otherwise.
fn compare(counts: &[Count], recorded: &[Count], tolerance: f64) -> Result<String> {
    let (mut rises, mut drops) = (String::new(), String::new());
    for (name, count) in counts {
        let Some((_, was)) = recorded.iter().find(|(other, _)| other == name) else {
            rises += &format!("\n  {name}: not in {RECORD}");
            continue;
        };
        let line = format!("\n  {name}: {count:.3}, recorded {was:.3}");
        // The last recorded digit of a count near 0 is more than the tolerance.
        if *count > was * (1.0 + tolerance) + 0.001 {
            rises += &line;
        } else if *count < was * (1.0 - tolerance) - 0.001 {
            drops += &line;
        }
    }
    for (name, _) in
        recorded.iter().filter(|(name, _)| counts.iter().all(|(other, _)| other != name))
    {
        rises += &format!("\n  {name}: recorded, and not counted any more");
    }
    let hint = "`cargo xtask counted --record` writes the new figures";
    if !rises.is_empty() {
        bail!("counts more instructions than before ({hint}):{rises}");
    }
    if drops.is_empty() {
        return Ok(format!(
            "{} counts within {:.0} % of their record",
            counts.len(),
            tolerance * 100.0
        ));
    }
    Ok(format!("fewer instructions than recorded: lower the figures ({hint}):{drops}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_and_missing_counts_fail_and_drops_are_told() {
        let recorded = parse("# Words.\n# rustc 1.95.0\n    4.000  f32 forward\n").unwrap();
        assert_eq!(recorded, [("f32 forward".to_string(), 4.0)]);
        let verdict = |figures: &[(&str, f64)]| {
            let counts: Vec<_> = figures.iter().map(|&(name, n)| (name.to_string(), n)).collect();
            compare(&counts, &recorded, 0.03)
        };
        assert!(verdict(&[("f32 forward", 4.1)]).is_ok_and(|text| text.contains("within")));
        assert!(verdict(&[("f32 forward", 3.8)]).is_ok_and(|text| text.contains("lower")));
        assert!(verdict(&[("f32 forward", 4.2)]).is_err());
        assert!(verdict(&[("f32 forward", 4.0), ("f32 both", 1.0)]).is_err());
        assert!(verdict(&[]).is_err());
    }
}
