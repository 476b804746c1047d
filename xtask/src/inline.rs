//! The step `inline`: below the entry points of `src/dispatch.rs` everything is inlined. A function
//! that is called instead is compiled without the entry's instruction set, and every vector passes
//! through memory on the way: right, and many times slower, so no other test would notice.
//!
//! Home-made: cargo-show-asm prints the code of a function, and no tool checks that it calls nothing.

use crate::check::Report;
use crate::dist;
use crate::tool::{Result, has, output, root, shell, target};
use anyhow::{Context, ensure};
use std::collections::BTreeMap;
use xshell::cmd;

/// The entry points of one instruction set: how many there are, and the calls from entry to callee.
#[derive(Default)]
struct Seen {
    entries: usize,
    calls: BTreeMap<(String, String), usize>,
}

/// Disassembles the library and looks for calls: there must be none.
pub fn check() -> Result<Report> {
    let sh = shell()?;
    let mut report = Report::default();
    if !cfg!(target_arch = "x86_64") || !has(&sh, "objdump") {
        report.skip("inlining: needs x86-64 and objdump".into());
        return Ok(report);
    }
    let modules = stamped(&sh.read_file(root().join("src/dispatch.rs"))?);
    ensure!(!modules.is_empty(), "no `entries!` with features in src/dispatch.rs");

    let library = dist::build(&target().join("dist"))?.lib.join("libxent.so");
    let options = ["--disassemble", "--demangle", "--no-show-raw-insn", "--no-addresses"];
    let listing = output(cmd!(sh, "objdump {options...} --section=.text {library}"))?;
    let seen = calls(&listing, &modules);
    let mut failures = String::new();
    for module in &modules {
        // Stripped, or renamed: a check that sees nothing must not pass.
        let seen = seen.get(module.as_str());
        let seen = seen.with_context(|| format!("no function of {module} in libxent.so"))?;
        report.done += &format!("{} entry points in {module}, ", seen.entries);
        for ((entry, callee), count) in &seen.calls {
            failures += &format!("\n  {module}::{entry} calls {callee}, {count} times");
        }
    }
    let hint = "#[inline(always)] lost?";
    ensure!(failures.is_empty(), "calls below entry points ({hint}):{failures}");
    report.done += "no calls";
    println!("ok  {}", report.done);
    Ok(report)
}

/// The modules that `entries!` stamps with a list of features that is not empty.
fn stamped(source: &str) -> Vec<String> {
    let mut modules = Vec::new();
    for invocation in source.split("\nentries!(").skip(1) {
        if let Some((module, rest)) = invocation.split_once(',')
            && rest.trim_start().starts_with("[\"")
        {
            modules.push(module.trim().to_string());
        }
    }
    modules
}

/// The calls out of the functions of these modules, by module.
fn calls<'a>(listing: &str, modules: &'a [String]) -> BTreeMap<&'a str, Seen> {
    let mut all: BTreeMap<&str, Seen> = BTreeMap::new();
    let mut inside: Option<(&str, String, &str)> = None;
    for line in listing.lines() {
        if let Some(symbol) = line.strip_prefix('<').and_then(|line| line.strip_suffix(">:")) {
            inside = None;
            for module in modules {
                // `xent::dispatch::avx2_entries::sum`, with type parameters or a hash or without.
                if let Some((_, name)) = symbol.split_once(&format!("dispatch::{module}::")) {
                    let entry = name.split("::").next().unwrap_or(name);
                    // The only one that is plain code: it asks the processor.
                    if entry != "detected" {
                        all.entry(module).or_default().entries += 1;
                        inside = Some((module, entry.to_string(), symbol));
                    }
                }
            }
        } else if let Some((module, entry, symbol)) = &inside
            && let Some(callee) = callee(line, symbol)
        {
            let seen = all.entry(module).or_default();
            *seen.calls.entry((entry.clone(), callee)).or_default() += 1;
        }
    }
    all
}

/// The function that an instruction of `symbol` calls: by `call`, or by a jump that leaves the function. A jump
/// through a register is a table within it (`match`), and allowed.
fn callee(line: &str, symbol: &str) -> Option<String> {
    let mut words = line.split_whitespace().skip_while(|word| matches!(*word, "bnd" | "notrack"));
    let mnemonic = words.next()?;
    let operand = words.collect::<Vec<_>>().join(" ");
    let label = |text: &str| {
        let label = text.strip_prefix('<')?.strip_suffix('>')?;
        let (name, offset) = label.rsplit_once("+0x").unwrap_or((label, ""));
        let is_offset = offset.chars().all(|c| c.is_ascii_hexdigit());
        Some((if is_offset { name } else { label }).to_string())
    };
    if mnemonic.starts_with("call") {
        Some(label(&operand).unwrap_or(operand))
    } else if mnemonic.starts_with('j') {
        match label(&operand) {
            Some(name) if name == symbol => None,
            Some(name) => Some(name),
            None if operand.starts_with("*%") => None,
            None => Some(operand),
        }
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "
entries!(portable_entries, [], portable::Portable);
entries!(avx2_entries, [\"avx2\", \"fma\"], avx2::Avx2);
entries!(
    avx512_entries,
    [\"avx512f\"],
    avx512::Avx512
);
";

    #[test]
    fn modules_with_features_are_found() {
        assert_eq!(stamped(SOURCE), ["avx2_entries", "avx512_entries"]);
    }

    #[test]
    fn calls_and_tail_calls_are_seen_and_tables_allowed() {
        let listing = "
<xent::dispatch::avx2_entries::sum>:
\tpush   %rbp
\tjne    <xent::dispatch::avx2_entries::sum+0x40>
\tnotrack jmp *%rsi
\tret
<xent::kernels::contiguous::sum>:
\tcall   <memset@plt>
<xent::dispatch::avx512_entries::max>:
\tcall   <xent::kernels::contiguous::max::{{closure}}>
\tcall   *0xc2471(%rip)        # <_DYNAMIC+0x248>
\tjmp    <xent::simd::avx512::load+0x10>
\tjmp    *0x20(%rip)
<xent::dispatch::avx512_entries::detected>:
\tcall   <std_detect::detect>
";
        let modules = stamped(SOURCE);
        let seen = calls(listing, &modules);
        assert_eq!((seen["avx2_entries"].entries, seen["avx2_entries"].calls.len()), (1, 0));
        let callees: Vec<&str> =
            seen["avx512_entries"].calls.keys().map(|(_, callee)| callee.as_str()).collect();
        assert_eq!(seen["avx512_entries"].entries, 1);
        assert_eq!(
            callees,
            [
                "*0x20(%rip)",
                "*0xc2471(%rip) # <_DYNAMIC+0x248>",
                "xent::kernels::contiguous::max::{{closure}}",
                "xent::simd::avx512::load",
            ]
        );
    }
}
