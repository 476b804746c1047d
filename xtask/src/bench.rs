//! `cargo xtask bench`: the targets, each beside its limit, and the pictures of them.

use crate::dist::{self, SYSTEM_LIBRARIES};
use crate::picture;
use crate::tool::{self, C, Result, cargo, make_directory, root, shown, target};
use std::fs;
use std::io::Write;
use std::process::Command;

/// What the last run measured.
pub const RECORD: &str = "docs/data/targets.csv";

/// `cargo xtask bench [--large] [--turns N] [--mib N]`: other figures than the default's are for
/// trying out, and nothing is recorded of them.
pub fn run(options: &[&str]) -> Result {
    let trial = options.iter().any(|option| matches!(*option, "--turns" | "--mib"));
    let path = if trial { target().join("targets.csv") } else { root().join(RECORD) };
    make_directory(path.parent().unwrap_or(&path))?;
    let mut command = cargo(["bench", "--package", "xent", "--bench", "targets", "--"]);
    command.args(options).arg("--record").arg(&path);
    tool::run(&mut command)?;
    let lines = tiny()?;
    let mut file = fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .map_err(|error| format!("cannot open {}: {error}", shown(&path)))?;
    file.write_all(lines.as_bytes())
        .map_err(|error| format!("cannot write {}: {error}", shown(&path)))?;
    println!("recorded in {}", shown(&path));
    if trial { Ok(()) } else { picture::draw() }
}

/// One call of 1x10 from C, on each set. Returns lines of the record.
fn tiny() -> Result<String> {
    let compiler = C.compiler()?;
    let dist = dist::build(&target().join("dist"))?;
    let directory = target().join("bench");
    make_directory(&directory)?;
    let program = directory.join("tiny");
    let wrap = ["malloc", "calloc", "realloc", "posix_memalign"];
    tool::run_quietly(
        compiler
            .command()
            .args(["-std=c11", "-O3", "-march=native", "-ffast-math", "-Wall", "-Wextra"])
            .args(wrap.map(|name| format!("-Wl,--wrap={name}")))
            .arg("-I")
            .arg(&dist.include)
            .arg(root().join("benches/c/tiny.c"))
            .arg(dist.static_library())
            .args(SYSTEM_LIBRARIES)
            .arg("-o")
            .arg(&program),
    )?;
    println!("\none call of 1x10 f32 from C");
    let mut record = String::new();
    for set in ["avx512", "avx2"] {
        let output = Command::new(&program).env("XENT_ISA", set).output();
        let output = output.map_err(|error| format!("cannot start tiny: {error}"))?;
        if !output.status.success() {
            println!("skipped: {set}: {}", String::from_utf8_lossy(&output.stderr).trim());
            continue;
        }
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let (what, value) =
                line.split_once(' ').ok_or_else(|| format!("tiny printed {line}"))?;
            let figure: f64 = value.parse().map_err(|_| format!("tiny printed {line}"))?;
            let (target, unit) = match what {
                "allocations" => (Some(0.0), ""),
                "threads" => (Some(1.0), ""),
                "plain-both" => (None, " ns"),
                _ => (Some(150.0), " ns"),
            };
            let verdict = match target {
                Some(target) if figure <= target => "pass",
                Some(_) => "falls short",
                None => "",
            };
            let target = target.map(|target| format!("<= {target}{unit}")).unwrap_or_default();
            println!("{:<17} {set:<8} {value}{unit:<4} {target:<11} {verdict}", what);
            record +=
                &format!("tiny-{what},f32,1x10,10,{set},1,,,{value}{unit},{target},{verdict}\n");
        }
    }
    Ok(record)
}
