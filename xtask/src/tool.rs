//! Paths, child processes and compilers.

use anyhow::{Context, anyhow, ensure};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use xshell::{Cmd, Shell, cmd};

pub type Result<T = ()> = anyhow::Result<T>;

/// The project's directory.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies inside the project")
}

/// The directory for build products: cargo's and those of these commands.
pub fn target() -> PathBuf {
    root().join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// The directory `name` in the target directory, made if it is absent.
pub fn directory(name: &str) -> Result<PathBuf> {
    let path = target().join(name);
    std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", shown(&path)))?;
    Ok(path)
}

/// A path as one would type it: relative to the project where it lies inside.
pub fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// The last part of a path without its extension.
pub fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// A shell in the project's directory.
pub fn shell() -> Result<Shell> {
    let sh = Shell::new()?;
    sh.change_dir(root());
    // cargo would take a relative directory from where the user typed the command.
    sh.set_var("CARGO_TARGET_DIR", target());
    Ok(sh)
}

/// Whether a program can be started.
pub fn has(sh: &Shell, program: &str) -> bool {
    cmd!(sh, "{program} --version").quiet().ignore_stderr().read().is_ok()
}

/// Whether this processor has AVX2 with FMA.
pub fn has_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Runs a command and prints its output only if it fails.
pub fn quietly(command: Cmd) -> Result {
    output(command).map(drop)
}

/// Runs a command and returns what it printed to standard output.
pub fn output(command: Cmd) -> Result<String> {
    let command = command.quiet().ignore_status();
    let output = command.output().with_context(|| format!("cannot start {command}"))?;
    let [text, error] =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    ensure!(output.status.success(), "{}: {command}\n{text}{error}", output.status);
    Ok(text)
}

/// Calls `work` with each of `all`, on all cores, up to the first failure.
pub fn on_all_cores<T: Sync>(all: &[T], work: impl Fn(&T) -> Result + Sync) -> Result {
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(Ok(()));
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(one) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = work(one) {
                        next.store(all.len(), Ordering::Relaxed);
                        *failure.lock().expect("no worker panics") = Err(error);
                    }
                }
            });
        }
    });
    failure.into_inner().expect("no worker panics")
}

/// A C or C++ compiler that was found to work.
#[derive(Clone, Debug)]
pub struct Compiler {
    /// As called: `gcc`, or the value of `CC`, which may carry arguments (`ccache gcc`).
    pub name: String,
    /// The first line of `--version`, without the program's name where gcc puts it first.
    pub version: String,
}

impl Compiler {
    fn find(sh: &Shell, name: &str) -> Option<Compiler> {
        let mut compiler = Compiler { name: name.to_string(), version: String::new() };
        let text = compiler.command(sh).arg("--version").quiet().ignore_stderr().read().ok()?;
        let line = text.lines().next()?;
        // gcc says "gcc (Debian ...) ..." or "cc (Debian ...) ...".
        let (_, rest) = line.split_once(' ')?;
        compiler.version = if rest.starts_with('(') { rest } else { line }.to_string();
        Some(compiler)
    }

    pub fn is_clang(&self) -> bool {
        self.version.contains("clang")
    }

    pub fn command<'a>(&self, sh: &'a Shell) -> Cmd<'a> {
        let mut words = self.name.split_whitespace();
        sh.cmd(words.next().unwrap_or_default()).args(words)
    }

    /// Whether the compiler links a program with these flags.
    pub fn links_with(&self, sh: &Shell, flags: &[&str]) -> Result<bool> {
        let directory = directory("xtask")?;
        let source = directory.join("probe.c");
        sh.write_file(&source, "int main(void) { return 0; }\n")?;
        let command = self.command(sh).args(flags).arg(source);
        Ok(quietly(command.arg("-o").arg(directory.join("probe"))).is_ok())
    }
}

/// A language's compilers: the environment variable that names one, and the usual names.
pub struct Language {
    pub name: &'static str,
    variable: &'static str,
    names: [&'static str; 3],
}

pub const C: Language = Language { name: "C", variable: "CC", names: ["cc", "gcc", "clang"] };

pub const CPP: Language =
    Language { name: "C++", variable: "CXX", names: ["c++", "g++", "clang++"] };

impl Language {
    /// The compiler to use: the environment's, else the first of the usual ones.
    pub fn compiler(&self, sh: &Shell) -> Result<Compiler> {
        Ok(self.compilers(sh)?.0.swap_remove(0))
    }

    /// Every compiler that works, each once, and a note on each usual one that is absent.
    pub fn compilers(&self, sh: &Shell) -> Result<(Vec<Compiler>, Vec<String>)> {
        let Language { variable, names, name: language } = self;
        let (mut found, mut absent) = (Vec::<Compiler>::new(), Vec::new());
        if let Some(name) = std::env::var(variable).ok().filter(|name| !name.trim().is_empty()) {
            let missing = || anyhow!("{variable}={name} is not a compiler that runs");
            found.push(Compiler::find(sh, &name).ok_or_else(missing)?);
        }
        for name in names {
            match Compiler::find(sh, name) {
                // `cc` is most often one of the others.
                Some(one) if found.iter().any(|other| other.version == one.version) => {}
                Some(one) => found.push(one),
                None => absent.push(format!("{name} not found")),
            }
        }
        let tried = names.join(", ");
        ensure!(
            !found.is_empty(),
            "no {language} compiler found: tried {tried} (set {variable} to name one)"
        );
        Ok((found, absent))
    }
}
