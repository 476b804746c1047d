//! The C and C++ side of `cargo xtask test`: every test with every compiler and
//! standard, the headers by themselves, and the examples (that in Rust as well).

use crate::check::Report;
use crate::demo::decompress;
use crate::dist::{self, Dist, SYSTEM_LIBRARIES};
use crate::tool::{
    C, CPP, Compiler, Language, Result, cargo, make_directory, root, run_quietly, shown, target,
};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

const STRICT: [&str; 5] = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-O2"];

/// A language with the files and standards it is tested in.
pub struct Suite {
    pub language: &'static Language,
    directory: &'static str,
    extension: &'static str,
    pub standards: [&'static str; 2],
    /// What becomes of a program in the second standard.
    second: Link,
    header: &'static str,
}

impl Suite {
    /// How much is optimised beside a sanitizer: of programs in C++ compiling is what takes the time, of
    /// those in C running, since they compute what is right themselves.
    pub fn level(&self) -> &'static str {
        if self.extension == "c" { "-O1" } else { "-O0" }
    }
}

pub const SUITES: [Suite; 2] = [
    Suite {
        language: &C,
        directory: "tests/c",
        extension: "c",
        standards: ["c11", "c17"],
        // Not a word of the header's depends on it.
        second: Link::Nothing,
        header: "xent.h",
    },
    Suite {
        language: &CPP,
        directory: "tests/cpp",
        extension: "cpp",
        standards: ["c++17", "c++20"],
        second: Link::Static,
        header: "xent.hpp",
    },
];

#[derive(Clone, Copy, PartialEq)]
pub enum Link {
    Static,
    Shared,
    /// An object file: the program is not run.
    Object,
    /// Nothing: what the compiler has to say about the source is all.
    Nothing,
}

/// One program to be built.
struct Build {
    name: String,
    compiler: Compiler,
    standard: &'static str,
    sources: Vec<PathBuf>,
    /// The object file of each; what is only read has none.
    units: Vec<PathBuf>,
    link: Link,
    /// Of its sources: the one that is run on every set.
    is_first: bool,
    output: PathBuf,
}

impl Build {
    fn is_program(&self) -> bool {
        !matches!(self.link, Link::Object | Link::Nothing)
    }

    fn new(
        compiler: &Compiler,
        standard: &'static str,
        sources: &[PathBuf],
        link: Link,
        directory: &Path,
    ) -> Build {
        let stem = sources[0].file_stem().unwrap_or_default().to_string_lossy();
        let linked = match link {
            Link::Static => "",
            Link::Shared => ", shared library",
            Link::Object => ", compiled only",
            Link::Nothing => ", read only",
        };
        let name = format!("{stem} ({} {standard}{linked})", compiler.name);
        let file = |name: &str| -> String {
            name.chars().map(|c| if c.is_alphanumeric() || c == '_' { c } else { '-' }).collect()
        };
        // Whatever they are linked with, they are the same.
        let unit = file(&format!("{stem}-{}-{standard}", compiler.name));
        let units = (0..sources.len()).map(|i| directory.join(format!("{unit}-{i}.o"))).collect();
        Build {
            output: directory.join(file(&name).trim_end_matches('-')),
            name,
            compiler: compiler.clone(),
            standard,
            sources: sources.to_vec(),
            units,
            link,
            is_first: false,
        }
    }

    /// Compiles one of its sources, or reads it.
    fn compile(&self, source: &Path, unit: &Path, dist: &Dist) -> Result {
        let mut command = self.compiler.command();
        command
            .arg(format!("-std={}", self.standard))
            .args(STRICT)
            .args(flags(&self.sources[0]))
            .arg("-I")
            .arg(&dist.include)
            .arg(source);
        if self.link == Link::Nothing {
            command.arg("-fsyntax-only");
        } else {
            command.arg("-c").arg("-o").arg(unit);
        }
        run_quietly(&mut command)
    }

    fn link(&self, dist: &Dist) -> Result {
        let mut command = self.compiler.command();
        command.args(flags(&self.sources[0])).args(&self.units);
        if self.link == Link::Static {
            command.arg(dist.static_library()).args(SYSTEM_LIBRARIES);
        } else {
            let rpath = format!("-Wl,-rpath,{}", dist.lib.display());
            command.arg("-L").arg(&dist.lib).args(["-lxent", "-lm", &rpath]);
        }
        run_quietly(command.arg("-pthread").arg("-o").arg(&self.output))
    }

    /// The program, which passes by ending with 0.
    fn program(&self) -> Command {
        let mut command = Command::new(&self.output);
        // cargo puts its debug directories there, and they come before the rpath.
        command.env_remove("LD_LIBRARY_PATH").current_dir(root());
        command
    }
}

/// By this variable long tests take samples of what they repeat.
pub const SAMPLED: (&str, &str) = ("XENT_TEST_STRIDE", "8");

/// What a program is compiled with because it is about that.
pub fn flags(source: &Path) -> &'static [&'static str] {
    match source.file_stem().and_then(|stem| stem.to_str()) {
        Some("openmp") => &["-fopenmp"],
        Some("fast_math") => &["-ffast-math"],
        _ => &[],
    }
}

/// Those of the programs that the compiler can build, and a note on each other.
pub fn buildable<'a>(
    compiler: &Compiler,
    programs: &'a [Vec<PathBuf>],
    report: &mut Report,
) -> Result<Vec<&'a Vec<PathBuf>>> {
    let mut found = Vec::new();
    for program in programs {
        let flags = flags(&program[0]);
        if flags.is_empty() || compiler.links_with(flags)? {
            found.push(program);
        } else {
            let (program, name) = (shown(&program[0]), &compiler.name);
            report.skip(format!("{program}: {name} does not link with {}", flags.join(" ")));
        }
    }
    Ok(found)
}

/// Compiles and links on all cores, since this is what takes the time; the first failure counts.
fn compile_all(builds: &[Build], dist: &Dist) -> Result {
    // What is linked with either library is compiled once.
    let mut units = BTreeMap::new();
    for build in builds {
        for (source, unit) in build.sources.iter().zip(&build.units) {
            units.entry(unit).or_insert((build, source));
        }
    }
    on_all_cores(&units.into_iter().collect::<Vec<_>>(), |(unit, (build, source))| {
        let failure = |message| format!("does not compile: {}\n{message}", build.name);
        build.compile(source, unit, dist).map_err(failure)
    })?;
    let programs: Vec<&Build> = builds.iter().filter(|build| build.is_program()).collect();
    on_all_cores(&programs, |build| {
        let failure = |message| format!("does not link: {}\n{message}", build.name);
        build.link(dist).map_err(failure)
    })
}

/// Does something with each, on all cores, up to the first failure.
pub fn on_all_cores<T: Sync>(all: &[T], work: impl Fn(&T) -> Result + Sync) -> Result {
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(one) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(message) = work(one) {
                        next.store(all.len(), Ordering::Relaxed);
                        failure.lock().expect("no worker panics").get_or_insert(message);
                    }
                }
            });
        }
    });
    failure.into_inner().expect("no worker panics").map_or(Ok(()), Err)
}

/// The programs of a suite: each file, with the file of the same name in `parts/`
/// if there is one, as a second unit to link.
pub fn programs(suite: &Suite) -> Result<Vec<Vec<PathBuf>>> {
    let directory = root().join(suite.directory);
    let entries = fs::read_dir(&directory)
        .map_err(|error| format!("cannot list {}: {error}", suite.directory))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|is| is == suite.extension))
        .collect();
    files.sort();
    if files.is_empty() {
        // An emptied directory must not look like a pass.
        return Err(format!("finds no tests in {}", suite.directory));
    }
    Ok(files
        .into_iter()
        .map(|file| {
            let part = directory.join("parts").join(file.file_name().unwrap_or_default());
            let part = part.is_file().then_some(part);
            std::iter::once(file).chain(part).collect()
        })
        .collect())
}

/// Two units that hold nothing but the header, included twice: it has to stand
/// alone, and both units have to fit in one program.
fn header_units(suite: &Suite, directory: &Path) -> Result<[PathBuf; 2]> {
    let include = format!("#include <{}>\n", suite.header).repeat(2);
    let label = suite.header.replace('.', "_");
    let write = |name: &str, text: &str| {
        let path = directory.join(format!("{label}_{name}.{}", suite.extension));
        fs::write(&path, format!("{include}{text}"))
            .map(|()| path)
            .map_err(|error| format!("cannot write the {} units: {error}", suite.header))
    };
    // A reference to the library, so that the program really links with it.
    let alone = write(
        "alone",
        "int unit(void);\nint main(void) { return unit() + (xent_version()[0] == 0); }\n",
    )?;
    let second = write("second", "int unit(void);\nint unit(void) { return 0; }\n")?;
    Ok([alone, second])
}

/// The sets below this machine's best that it can run, and notes on the others.
fn lower_sets(report: &mut Report) -> Vec<&'static str> {
    let mut sets = vec!["portable"];
    #[cfg(target_arch = "x86_64")]
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    let avx2 = false;
    if avx2 {
        sets.insert(0, "avx2");
    } else {
        report.skip("XENT_ISA=avx2: this processor has no AVX2 with FMA".to_string());
    }
    sets
}

fn installed() -> Result<(Dist, PathBuf)> {
    let dist = dist::build(&target().join("dist"))?;
    let directory = target().join("xtask");
    make_directory(&directory)?;
    Ok((dist, directory))
}

/// The step `c`.
pub fn tests() -> Result<Report> {
    let (dist, directory) = installed()?;
    let mut report = Report::default();
    let mut builds = Vec::new();
    for suite in &SUITES {
        let (compilers, absent) = suite.language.compilers()?;
        for compiler in &compilers {
            println!("{}: {} {}", suite.language.name, compiler.name, compiler.version);
        }
        for what in absent {
            report.skip(what);
        }
        let programs = programs(suite)?;
        let units = header_units(suite, &directory)?;
        for (i, compiler) in compilers.iter().enumerate() {
            let programs = buildable(compiler, &programs, &mut report)?;
            // What a standard changes in the header, it changes beside one compiler as beside the other.
            let second = if i == 0 { suite.second } else { Link::Nothing };
            for (standard, link) in suite.standards.into_iter().zip([Link::Static, second]) {
                builds.push(Build::new(compiler, standard, &units, link, &directory));
                for program in &programs {
                    let is_first = i == 0 && standard == suite.standards[0];
                    let build = Build::new(compiler, standard, program, link, &directory);
                    builds.push(Build { is_first, ..build });
                }
            }
        }
        for program in buildable(&compilers[0], &programs, &mut report)? {
            builds.push(Build::new(
                &compilers[0],
                suite.standards[0],
                program,
                Link::Shared,
                &directory,
            ));
        }
    }
    compile_all(&builds, &dist)?;

    // The statically linked first build of each test goes through every set; the library is the same
    // for the others, which take samples of what is repeated, on the best.
    let sets = lower_sets(&mut report);
    let mut runs: Vec<(&Build, Option<&str>)> = Vec::new();
    for build in builds.iter().filter(|build| build.is_program()) {
        runs.push((build, None));
        if build.is_first {
            runs.extend(sets.iter().map(|&set| (build, Some(set))));
        }
    }
    on_all_cores(&runs, |(build, set)| {
        let Some(set) = set else {
            let mut program = build.program();
            if !build.is_first {
                program.env(SAMPLED.0, SAMPLED.1);
            }
            run_quietly(&mut program)?;
            println!("ok  {}", build.name);
            return Ok(());
        };
        run_quietly(build.program().env("XENT_ISA", set))
            .map_err(|message| format!("with XENT_ISA={set} {message}"))?;
        println!("ok  {} on {set}", build.name);
        Ok(())
    })?;
    report.done = format!("{} builds, {} runs", builds.len(), runs.len());
    Ok(report)
}

/// The step `examples`: the programs run to their goal, those in C and C++ with either
/// library; the C++ trainer, which takes a minute, is compiled (`cargo xtask demo` runs it).
pub fn examples() -> Result<Report> {
    let (dist, directory) = installed()?;
    let mut report = Report::default();
    let digits = decompress("digits.csv")?;
    let example = |file: &str| vec![root().join("examples").join(file)];

    // In the profile of the step `rust`, which has compiled it.
    run_quietly(&mut cargo(["run", "--profile", "test", "--example", "features"]))?;
    println!("ok  features (Rust)");

    let mut builds = Vec::new();
    let (compilers, absent) = C.compilers()?;
    absent.into_iter().for_each(|what| report.skip(what));
    for compiler in &compilers {
        for file in ["c/features.c", "c/xor.c", "c/train_digits.c"] {
            for link in [Link::Static, Link::Shared] {
                builds.push(Build::new(compiler, "c11", &example(file), link, &directory));
            }
        }
    }
    let (compilers, absent) = CPP.compilers()?;
    absent.into_iter().for_each(|what| report.skip(what));
    for compiler in &compilers {
        for link in [Link::Static, Link::Shared] {
            let features = example("cpp/features.cpp");
            builds.push(Build::new(compiler, "c++17", &features, link, &directory));
        }
        let trainer = example("cpp/train_lm.cpp");
        builds.push(Build::new(compiler, "c++17", &trainer, Link::Object, &directory));
    }
    compile_all(&builds, &dist)?;

    for build in &builds {
        if build.is_program() {
            let mut program = build.program();
            if build.sources[0].ends_with("train_digits.c") {
                program.arg(&digits);
            }
            run_quietly(&mut program)?;
        }
        println!("ok  {}", build.name);
    }
    report.done = format!("{} programs", builds.len() + 1);
    Ok(report)
}
