//! The C and C++ side of `cargo xtask test`: every test with every compiler and
//! standard, the headers by themselves, and the examples (that in Rust as well).

use crate::check::Report;
use crate::demo::decompress;
use crate::dist::{self, Dist, SYSTEM_LIBRARIES};
use crate::tool::{
    C, CPP, Compiler, Language, Result, directory, has_avx2, on_all_cores, quietly, root, shell,
    shown, stem, target,
};
use anyhow::{Context, ensure};
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

/// What users compile the headers with. C has no old casts to warn of, and its compilers take the flag.
const STRICT: &str =
    "-O2 -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wold-style-cast -Werror";

/// This variable makes long tests take samples of what they repeat.
pub const SAMPLED: (&str, &str) = ("XENT_TEST_STRIDE", "8");

/// A language with the files and standards it is tested in.
pub struct Suite {
    pub language: &'static Language,
    directory: &'static str,
    extension: &'static str,
    pub standards: [&'static str; 2],
    header: &'static str,
}

pub const SUITES: [Suite; 2] = [
    Suite {
        language: &C,
        directory: "tests/c",
        extension: "c",
        standards: ["c11", "c17"],
        header: "xent.h",
    },
    Suite {
        language: &CPP,
        directory: "tests/cpp",
        extension: "cpp",
        standards: ["c++17", "c++20"],
        header: "xent.hpp",
    },
];

impl Suite {
    /// The programs: each file, with the file of the same name in `parts/` if there is one, as a second unit.
    pub fn programs(&self, sh: &Shell) -> Result<Vec<Vec<PathBuf>>> {
        let directory = root().join(self.directory);
        let mut files = sh.read_dir(&directory)?;
        files.retain(|path| path.extension().is_some_and(|is| is == self.extension));
        // An emptied directory must not look like a pass.
        ensure!(!files.is_empty(), "no tests in {}", self.directory);
        let part = |file: &PathBuf| directory.join("parts").join(file.file_name()?).into();
        let with_part = |file: PathBuf| {
            let part: Option<PathBuf> = part(&file);
            let part = part.filter(|part| part.is_file());
            std::iter::once(file).chain(part).collect()
        };
        Ok(files.into_iter().map(with_part).collect())
    }

    /// Two units that hold nothing but the header, included twice: it has to stand alone, and both units have to
    /// fit in one program, which refers to the library so that it really links with it.
    fn header_units(&self, sh: &Shell) -> Result<Vec<PathBuf>> {
        let include = format!("#include <{}>\n", self.header).repeat(2);
        let main =
            "int unit(void);\nint main(void) { return unit() + (xent_version()[0] == 0); }\n";
        let second = "int unit(void);\nint unit(void) { return 0; }\n";
        let mut units = Vec::new();
        for (name, text) in [("alone", main), ("second", second)] {
            let file = format!("header_{name}.{}", self.extension);
            units.push(directory("xtask")?.join(file));
            sh.write_file(&units[units.len() - 1], format!("{include}{text}"))?;
        }
        Ok(units)
    }
}

/// A C or C++ program to be built and run. It passes by ending with 0.
pub struct Program {
    pub name: String,
    pub sources: Vec<PathBuf>,
    compiler: Compiler,
    flags: Vec<String>,
    /// What it is linked with; empty if the compiler only checks the source.
    library: Vec<String>,
    output: PathBuf,
}

impl Program {
    /// `label` tells programs of the same source apart; `library` is what the compiler links them with.
    pub fn new(
        compiler: &Compiler,
        label: &str,
        flags: &[&str],
        sources: &[PathBuf],
        library: &[String],
    ) -> Result<Program> {
        let name = format!("{} ({} {label})", shown(&sources[0]), compiler.name);
        let file = name.replace(|c: char| !(c.is_alphanumeric() || c == '_'), "-");
        Ok(Program {
            name,
            sources: sources.to_vec(),
            compiler: compiler.clone(),
            flags: flags.iter().chain(about(&sources[0])).map(ToString::to_string).collect(),
            library: library.to_vec(),
            output: directory("xtask")?.join(file.trim_end_matches('-')),
        })
    }

    /// The arguments that link the static library.
    pub fn statically(library: &Path) -> Vec<String> {
        let libraries = SYSTEM_LIBRARIES.map(str::to_string);
        std::iter::once(library.display().to_string()).chain(libraries).collect()
    }

    pub fn is_run(&self) -> bool {
        !self.library.is_empty()
    }

    pub fn compile(&self) -> Result {
        let sh = shell()?;
        let command = self.compiler.command(&sh).args(&self.flags).arg("-Iinclude");
        let command = command.args(&self.sources);
        let command = if self.is_run() {
            command.args(&self.library).args(["-pthread", "-o"]).arg(&self.output)
        } else {
            command.arg("-fsyntax-only")
        };
        quietly(command).with_context(|| format!("does not compile: {}", self.name))
    }

    /// The program's file, for `runner` (an emulator, a checker) to run, or for nobody.
    pub fn command<'a>(&self, sh: &'a Shell, runner: &[&str]) -> xshell::Cmd<'a> {
        let output = &self.output;
        let command = match runner {
            [program, arguments @ ..] => sh.cmd(program).args(arguments).arg(output),
            [] => sh.cmd(output),
        };
        // cargo puts its debug directories there, and they come before the rpath.
        command.env_remove("LD_LIBRARY_PATH")
    }

    /// Runs it under `runner` with these variables.
    pub fn run(&self, runner: &[&str], variables: &[(&str, &str)]) -> Result {
        let sh = shell()?;
        quietly(self.command(&sh, runner).envs(variables.iter().copied()))?;
        let set = variables.iter().find(|variable| variable.0 == "XENT_ISA");
        println!("ok  {}{}", self.name, set.map_or(String::new(), |set| format!(" on {}", set.1)));
        Ok(())
    }
}

/// The flags that a program is about.
fn about(source: &Path) -> &'static [&'static str] {
    match &*stem(source) {
        "openmp" => &["-fopenmp"],
        "fast_math" => &["-ffast-math"],
        "no_exceptions" => &["-fno-exceptions"],
        "mlp_eigen" => &["-isystem/usr/include/eigen3", "-include", "Eigen/Core"],
        _ => &[],
    }
}

/// Those of the programs that the compiler can build, and a note on each other.
pub fn buildable<'a>(
    sh: &Shell,
    compiler: &Compiler,
    programs: &'a [Vec<PathBuf>],
    report: &mut Report,
) -> Result<Vec<&'a Vec<PathBuf>>> {
    let mut found = Vec::new();
    for program in programs {
        let flags = about(&program[0]);
        if flags.is_empty() || compiler.links_with(sh, flags)? {
            found.push(program);
        } else {
            let (program, name) = (shown(&program[0]), &compiler.name);
            report.skip(format!("{program}: {name} does not link with {}", flags.join(" ")));
        }
    }
    Ok(found)
}

/// The sets below this machine's best that it can run, and notes on the others.
fn lower_sets(report: &mut Report) -> &'static [&'static str] {
    if has_avx2() {
        return &["avx2", "portable"];
    }
    report.skip("XENT_ISA=avx2: this processor has no AVX2 with FMA".to_string());
    &["portable"]
}

fn shared(dist: &Dist) -> Vec<String> {
    let lib = dist.lib.display();
    [format!("-L{lib}"), "-lxent".into(), "-lm".into(), format!("-Wl,-rpath,{lib}")].to_vec()
}

/// The compilers of a language, printed, and notes on those that are absent.
fn compilers(sh: &Shell, language: &Language, report: &mut Report) -> Result<Vec<Compiler>> {
    let (compilers, absent) = language.compilers(sh)?;
    for compiler in &compilers {
        println!("{}: {} {}", language.name, compiler.name, compiler.version);
    }
    absent.into_iter().for_each(|what| report.skip(what));
    Ok(compilers)
}

/// The step `c`.
pub fn tests() -> Result<Report> {
    let sh = shell()?;
    let dist = dist::build(&target().join("dist"))?;
    let (archive, shared) = (Program::statically(&dist.static_library()), shared(&dist));
    let mut report = Report::default();
    // The first compiler's static programs run on every set. The library is the same for all others: they take
    // samples of what they repeat, on the best set.
    let (mut on_every_set, mut sampled) = (Vec::new(), Vec::new());
    for suite in &SUITES {
        let mut programs = suite.programs(&sh)?;
        programs.push(suite.header_units(&sh)?);
        for (i, compiler) in compilers(&sh, suite.language, &mut report)?.iter().enumerate() {
            let [first, second] = suite.standards.map(|standard| format!("-std={standard}"));
            for sources in buildable(&sh, compiler, &programs, &mut report)? {
                let program = |standard: &str, label: &str, library: &[String]| {
                    let flags: Vec<_> = STRICT.split(' ').chain([standard]).collect();
                    Program::new(compiler, label, &flags, sources, library)
                };
                let all = if i == 0 { &mut on_every_set } else { &mut sampled };
                all.push(program(&first, suite.standards[0], &archive)?);
                // A later standard changes the headers for one compiler as for the other; C's has no effect on them.
                let runs = i == 0 && suite.extension == "cpp";
                let library: &[String] = if runs { &archive } else { &[] };
                sampled.push(program(&second, suite.standards[1], library)?);
                if i == 0 {
                    sampled.push(program(&first, "shared library", &shared)?);
                }
            }
        }
    }
    let builds: Vec<&Program> = on_every_set.iter().chain(&sampled).collect();
    on_all_cores(&builds, |program| program.compile())?;

    let sets = lower_sets(&mut report);
    let mut runs: Vec<(&Program, Vec<(&str, &str)>)> = Vec::new();
    for program in &on_every_set {
        runs.push((program, vec![]));
        runs.extend(sets.iter().map(|set| (program, vec![("XENT_ISA", *set)])));
    }
    runs.extend(sampled.iter().filter(|one| one.is_run()).map(|one| (one, vec![SAMPLED])));
    on_all_cores(&runs, |(program, variables)| program.run(&[], variables))?;
    cmd!(sh, "tests/cpp/refused/run").run()?;
    report.done = format!("{} builds, {} runs", builds.len(), runs.len());
    Ok(report)
}

/// The step `examples`: the programs run to their goal, those in C and C++ with either
/// library; the C++ trainer, which takes a minute, is compiled (`cargo xtask demo` runs it).
pub fn examples() -> Result<Report> {
    let sh = shell()?;
    let dist = dist::build(&target().join("dist"))?;
    let (archive, shared) = (Program::statically(&dist.static_library()), shared(&dist));
    let libraries = [("static", archive), ("shared", shared), ("compiled only", vec![])];
    let mut report = Report::default();
    let digits = decompress("digits.csv")?;

    quietly(cmd!(sh, "cargo run --profile test --example features"))?;
    println!("ok  features (Rust)");

    let mut programs = Vec::new();
    let c: &[_] = &["c/features.c", "c/openmp.c", "c/xor.c", "c/train_digits.c"];
    let cpp: &[_] =
        &["cpp/features.cpp", "cpp/mlp_eigen.cpp", "cpp/recipes.cpp", "cpp/train_lm.cpp"];
    for (language, standard, files) in [(&C, "-std=c11", c), (&CPP, "-std=c++17", cpp)] {
        let flags: Vec<_> = STRICT.split(' ').chain([standard]).collect();
        let files: Vec<_> =
            files.iter().map(|file| vec![root().join("examples").join(file)]).collect();
        for compiler in compilers(&sh, language, &mut report)? {
            for file in buildable(&sh, &compiler, &files, &mut report)? {
                let is_run = !file[0].ends_with("train_lm.cpp");
                for (label, library) in if is_run { &libraries[..2] } else { &libraries[2..] } {
                    programs.push(Program::new(&compiler, label, &flags, file, library)?);
                }
            }
        }
    }
    on_all_cores(&programs, Program::compile)?;
    for program in programs.iter().filter(|program| program.is_run()) {
        let needs_digits = program.sources[0].ends_with("train_digits.c");
        quietly(program.command(&sh, &[]).args(needs_digits.then_some(&digits)))?;
        println!("ok  {}", program.name);
    }
    report.done = format!("{} programs", programs.len() + 1);
    Ok(report)
}
