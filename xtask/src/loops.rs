//! `cargo xtask loops`: the instructions that the kernels spend their time in, as the compiler made
//! them, and how many there are an element; with llvm-mca, how many cycles a model of the
//! processor needs for them when nothing has to be waited for.

use crate::tool::{Result, cargo, output, root, run, shown, target};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// The file that the listings are kept in.
const LISTINGS: &str = "docs/data/loops.txt";

/// What llvm-mca models, for each instruction set.
const PROCESSORS: [(&str, &str); 2] = [("avx512", "icelake-server"), ("avx2", "haswell")];

/// A loop of an entry point: of those that no other begins in, the one that `pick` says.
struct Shown {
    title: &'static str,
    set: &'static str,
    /// The entry point of `src/dispatch.rs`, with its types as symbols spell them.
    entry: &'static str,
    pick: Pick,
    /// Logits that a turn is for.
    logits: usize,
}

enum Pick {
    /// The one that computes most.
    Largest,
    /// The one with most of these.
    Most(&'static str),
    /// The shortest that has one of these.
    Shortest(&'static str),
}

use Pick::{Largest, Most, Shortest};

const fn one(
    title: &'static str,
    set: &'static str,
    entry: &'static str,
    pick: Pick,
    logits: usize,
) -> Shown {
    Shown { title, set, entry, pick, logits }
}

const LOOPS: [Shown; 10] = [
    one("forward, f32", "avx512", "sums::<xent::simd::avx512::Avx512, f32>", Largest, 64),
    one("forward, f32", "avx2", "sums::<xent::simd::avx2::Avx2, f32>", Largest, 64),
    one(
        "forward, bf16",
        "avx512",
        "sums::<xent::simd::avx512::Avx512, half::bfloat::bf16>",
        Largest,
        64,
    ),
    one("forward, f64", "avx512", "sums::<xent::simd::avx512::Avx512Wide, f64>", Largest, 32),
    one(
        "in place, first sweep, f32",
        "avx512",
        "sum_kept::<xent::simd::avx512::Avx512, f32>",
        Largest,
        64,
    ),
    one(
        "in place, first sweep, f32",
        "avx2",
        "sum_kept::<xent::simd::avx2::Avx2, f32>",
        Largest,
        64,
    ),
    one(
        "narrow and inner, the look, f32",
        "avx512",
        "tile_sums::<xent::simd::avx512::Avx512>",
        Most("vmaxps"),
        64,
    ),
    one(
        "narrow and inner, the look, f32",
        "avx2",
        "tile_sums::<xent::simd::avx2::Avx2>",
        Most("vmaxps"),
        32,
    ),
    one(
        "narrow and inner, the sum, f32",
        "avx512",
        "tile_sums::<xent::simd::avx512::Avx512>",
        Shortest("vpslld"),
        16,
    ),
    one(
        "narrow and inner, the sum, f32",
        "avx2",
        "tile_sums::<xent::simd::avx2::Avx2>",
        Shortest("vpslld"),
        8,
    ),
];

/// An instruction and where it is.
type Line<'a> = (u64, &'a str);

/// `cargo xtask loops`.
pub fn list() -> Result {
    if !cfg!(target_arch = "x86_64") {
        return Err("loops knows x86-64 only".to_string());
    }
    let listing = disassembly()?;
    let mca = processor_model();
    if mca.is_none() {
        println!("llvm-mca not found: no cycles");
    }
    let mut listings = String::from(
        "# The loops of docs/performance.md as the compiler made them; `cargo xtask loops` writes this.\n",
    );
    println!(
        "| loop | set | logits a turn | instructions | arithmetic | loads | stores | cycles |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for shown in &LOOPS {
        let symbol = format!("xent::dispatch::{}_entries::{}", shown.set, shown.entry);
        let body = pick(&function(&listing, &symbol)?, &shown.pick)
            .ok_or_else(|| format!("finds no loop in {symbol}"))?;
        let count = |f: fn(&str) -> bool| body.iter().filter(|line| f(line)).count();
        let cycles = match &mca {
            Some(program) => cycles(program, shown.set, &body)?,
            None => "-".to_string(),
        };
        println!(
            "| {} | {} | {} | {} | {} | {} | {} | {cycles} |",
            shown.title,
            shown.set,
            shown.logits,
            body.len(),
            count(is_arithmetic),
            count(is_load),
            count(is_store),
        );
        write!(listings, "\n# {}, {}: {} logits\n", shown.title, shown.set, shown.logits)
            .and_then(|()| body.iter().try_for_each(|line| writeln!(listings, "    {line}")))
            .map_err(|error| error.to_string())?;
    }
    fs::write(root().join(LISTINGS), listings)
        .map_err(|error| format!("cannot write {LISTINGS}: {error}"))?;
    println!("\nlistings in {LISTINGS}");
    Ok(())
}

/// The library's code, with names that say which types a function is for.
fn disassembly() -> Result<String> {
    let directory = target().join("loops");
    run(cargo(["rustc", "--release", "--package", "xent", "--lib", "--crate-type", "cdylib"])
        .args(["--features", "capi"])
        .env("CARGO_TARGET_DIR", &directory)
        .env("RUSTFLAGS", "-Csymbol-mangling-version=v0"))?;
    output(
        Command::new("objdump")
            .args(["--disassemble", "--demangle", "--no-show-raw-insn", "--section=.text"])
            .arg(directory.join("release").join("libxent.so")),
    )
}

/// The instructions of a function.
fn function<'a>(listing: &'a str, symbol: &str) -> Result<Vec<Line<'a>>> {
    let head = format!(" <{symbol}>:\n");
    let (_, rest) =
        listing.split_once(&head).ok_or_else(|| format!("finds no function {symbol}"))?;
    let body = rest.split("\n\n").next().unwrap_or(rest);
    Ok(body
        .lines()
        .filter_map(|line| {
            let (address, text) = line.split_once(":\t")?;
            Some((u64::from_str_radix(address.trim(), 16).ok()?, text))
        })
        .collect())
}

/// The body of a loop, from where a jump backwards goes to that jump.
fn pick(function: &[Line], pick: &Pick) -> Option<Vec<String>> {
    let mut loops: Vec<(usize, usize)> = Vec::new();
    for (end, (_, text)) in function.iter().enumerate() {
        let to = text.strip_prefix('j').and_then(|jump| jump.split_whitespace().nth(1));
        let to = to.and_then(|address| u64::from_str_radix(address, 16).ok());
        let start = to.and_then(|to| function.binary_search_by_key(&to, |line| line.0).ok());
        if let Some(start) = start.filter(|start| *start <= end) {
            loops.push((start, end));
        }
    }
    let is_inner = |a: &&(usize, usize)| {
        let begins_in = |b: &(usize, usize)| b != *a && a.0 <= b.0 && b.0 <= a.1;
        !loops.iter().any(begins_in)
    };
    let body = |range: &(usize, usize)| function[range.0..=range.1].iter().map(|line| line.1);
    let count =
        |range: &(usize, usize), f: &dyn Fn(&str) -> bool| body(range).filter(|t| f(t)).count();
    let inner = loops.iter().filter(is_inner);
    let best = match pick {
        Largest => inner.max_by_key(|range| count(range, &is_arithmetic)),
        Most(name) => inner.max_by_key(|range| count(range, &|text| text.starts_with(name))),
        Shortest(name) => inner
            .filter(|range| count(range, &|text| text.starts_with(name)) > 0)
            .min_by_key(|range| range.1 - range.0),
    };
    // Without what objdump adds to an operand: a symbol, a comment; and without where a constant or a
    // jump's end is, which any other change moves.
    let near = |word: &str| match word.split_once("(%rip)") {
        Some((_, rest)) => format!("(%rip){rest}"),
        None => word.to_string(),
    };
    let clean = |text: &str| {
        let text = text.split(['<', '#']).next().unwrap_or(text);
        let words = if text.starts_with('j') { 1 } else { usize::MAX };
        text.split_whitespace().take(words).map(near).collect::<Vec<_>>().join(" ")
    };
    Some(body(best?).map(clean).collect())
}

/// What the ports for vectors compute: no move, which a register's renaming or a load does.
fn is_arithmetic(text: &str) -> bool {
    text.starts_with('v') && !text.starts_with("vmov") && !text.starts_with("vbroadcast")
}

/// A memory operand that comes before the last one is read.
fn is_load(text: &str) -> bool {
    let is_memory = text.contains('(') && !text.starts_with("lea") && !text.starts_with("prefetch");
    is_memory && !is_store(text)
}

fn is_store(text: &str) -> bool {
    text.starts_with("vmov") && text.trim_end().ends_with(')')
}

/// The newest llvm-mca, if there is any.
fn processor_model() -> Option<String> {
    let names = (14..=25).rev().map(|version| format!("llvm-mca-{version}"));
    names.chain(["llvm-mca".to_string()]).find(|name| {
        let mut command = Command::new(name);
        command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    })
}

/// The least cycles of a turn by llvm-mca's model, when all operands are there.
fn cycles(program: &str, set: &str, body: &[String]) -> Result<String> {
    let (_, processor) = PROCESSORS
        .iter()
        .find(|(of, _)| *of == set)
        .ok_or_else(|| format!("knows no processor for {set}"))?;
    // A jump's address is no label.
    let lines = body.iter().filter(|line| !line.starts_with('j'));
    let source: Vec<&str> = lines.map(String::as_str).collect();
    let path = target().join("loops").join("body.s");
    fs::write(&path, source.join("\n") + "\n")
        .map_err(|error| format!("cannot write {}: {error}", shown(&path)))?;
    let report = mca(program, processor, &path)?;
    let line = report.lines().find_map(|line| line.strip_prefix("Block RThroughput:"));
    let cycles = line.ok_or_else(|| format!("{program} reports no throughput"))?;
    Ok(cycles.trim().to_string())
}

fn mca(program: &str, processor: &str, path: &Path) -> Result<String> {
    output(
        Command::new(program)
            .arg("-mtriple=x86_64-unknown-linux-gnu")
            .arg(format!("-mcpu={processor}"))
            .arg(path),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "
0000000000000010 <xent::dispatch::avx2_entries::other>:
  10:\tret

0000000000000020 <xent::dispatch::avx2_entries::sum>:
  20:\txor    %eax,%eax
  22:\tvmovups (%rdi,%rax,4),%ymm1
  24:\tvaddps 0x20(%rdi,%rax,4),%ymm1,%ymm0
  26:\tvmulps -0x3f4(%rip),%ymm0,%ymm0        # 9b48 <table+0x8>
  28:\tvmovups %ymm0,(%rsi,%rax,4)
  2a:\tadd    $0x10,%rax
  2e:\tcmp    %rcx,%rax
  30:\tjb     22 <xent::dispatch::avx2_entries::sum+0x2>
  32:\tdec    %rdx
  34:\tjne    20 <xent::dispatch::avx2_entries::sum>
  36:\tret
";

    #[test]
    fn the_inner_loop_is_found_and_counted() {
        let lines = function(LISTING, "xent::dispatch::avx2_entries::sum").unwrap();
        assert_eq!(lines.len(), 11);
        let body = pick(&lines, &Largest).unwrap();
        assert_eq!((body.len(), body[0].as_str()), (7, "vmovups (%rdi,%rax,4),%ymm1"));
        assert_eq!(body[2], "vmulps (%rip),%ymm0,%ymm0");
        let count = |f: fn(&str) -> bool| body.iter().filter(|line| f(line)).count();
        assert_eq!([count(is_arithmetic), count(is_load), count(is_store)], [2, 3, 1]);
        assert_eq!(pick(&lines, &Most("vmulps")), Some(body.clone()));
        assert_eq!(pick(&lines, &Shortest("vaddps")), Some(body));
        assert_eq!(pick(&lines, &Shortest("vsubps")), None);
    }

    #[test]
    fn what_is_not_there_is_said() {
        assert!(function(LISTING, "xent::dispatch::avx2_entries::max").is_err());
        let other = function(LISTING, "xent::dispatch::avx2_entries::other").unwrap();
        assert_eq!(pick(&other, &Largest), None);
    }
}
