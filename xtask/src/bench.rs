//! `cargo xtask bench`: the targets, each beside its limit, and the pictures of them.

use crate::c::Program;
use crate::dist;
use crate::picture;
use crate::tool::{C, Result, directory, root, shell, shown, target};
use anyhow::Context;
use xshell::{Shell, cmd};

/// The figures of the last run.
pub const RECORD: &str = "docs/data/targets.csv";

/// `cargo xtask bench [--large] [--turns N] [--mib N]`: a run with other turns or sizes is for
/// trying out, and is recorded in the target directory.
pub fn run(options: &[&str]) -> Result {
    let sh = shell()?;
    let trial = options.iter().any(|option| matches!(*option, "--turns" | "--mib"));
    let path = if trial { target().join("targets.csv") } else { root().join(RECORD) };
    cmd!(sh, "cargo bench --package xent --bench targets -- {options...} --record {path}").run()?;
    let text = sh.read_file(&path)? + &tiny(&sh)?;
    sh.write_file(&path, text)?;
    println!("recorded in {}", shown(&path));
    if trial { Ok(()) } else { picture::draw() }
}

/// `cargo xtask bench grid [TURNS [SHAPE]]`: a grid of shapes beside two loops of C, the worst ratios last.
pub fn grid(options: &[&str]) -> Result {
    let (sh, dist) = (shell()?, dist::build(&target().join("dist"))?);
    let (include, library, output) = (&dist.include, dist.static_library(), directory("bench")?);
    Ok(cmd!(sh, "benches/c/grid {include} {library} {output} {options...}").run()?)
}

/// One call of 1x10 from C, on each set. Returns lines of the record.
fn tiny(sh: &Shell) -> Result<String> {
    let library = Program::statically(&dist::build(&target().join("dist"))?.static_library());
    let program = directory("bench")?.join("tiny");
    C.compiler(sh)?
        .command(sh)
        .args(["-std=c11", "-O3", "-march=native", "-ffast-math", "-Wall", "-Wextra", "-Iinclude"])
        .args(["malloc", "calloc", "realloc", "posix_memalign"].map(|f| format!("-Wl,--wrap={f}")))
        .arg("benches/c/tiny.c")
        .args(library)
        .arg("-o")
        .arg(&program)
        .run()?;
    println!("\none call of 1x10 f32 from C");
    let mut record = String::new();
    for set in ["avx512", "avx2"] {
        let output = cmd!(sh, "{program}").env("XENT_ISA", set).quiet().ignore_status().output()?;
        if !output.status.success() {
            println!("skipped: {set}: {}", String::from_utf8_lossy(&output.stderr).trim());
            continue;
        }
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let (what, value) = line.split_once(' ').context("tiny printed no figure")?;
            let figure: f64 = value.parse()?;
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
