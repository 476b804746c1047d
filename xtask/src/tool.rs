//! Paths, child processes and compilers.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What went wrong, in words for the person at the terminal.
pub type Result<T = ()> = std::result::Result<T, String>;

/// The project's directory.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies inside the project")
}

/// Where cargo and these commands put what they make.
pub fn target() -> PathBuf {
    // Relative to the project, as every cargo here runs there.
    root().join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// A path as one would type it: relative to the project where it lies inside.
pub fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// Makes a directory and those above it.
pub fn make_directory(path: &Path) -> Result {
    std::fs::create_dir_all(path).map_err(|error| format!("cannot create {}: {error}", shown(path)))
}

/// The cargo that runs this command, in the project's directory.
pub fn cargo<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root()).env("CARGO_TARGET_DIR", target());
    command
}

/// The programs that a `cargo` which runs none of them makes.
pub fn executables(command: &mut Command) -> Result<Vec<PathBuf>> {
    let messages = output(command.args(["--message-format", "json-render-diagnostics"]))?;
    let path = |line: &str| {
        let (_, rest) = line.split_once("\"executable\":\"")?;
        rest.split('"').next().map(PathBuf::from)
    };
    Ok(messages.lines().filter_map(path).collect())
}

/// Runs a command with its output on the terminal.
pub fn run(command: &mut Command) -> Result {
    let status =
        command.status().map_err(|error| format!("cannot start {}: {error}", line(command)))?;
    if status.success() { Ok(()) } else { Err(format!("failed with {status}: {}", line(command))) }
}

/// Runs a command whose output matters only if it fails.
pub fn run_quietly(command: &mut Command) -> Result {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot start {}: {error}", line(command)))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "failed with {}: {}\n{}{}",
        output.status,
        line(command),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    ))
}

/// What a command prints.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot start {}: {error}", line(command)))?;
    if !output.status.success() {
        return Err(format!("failed with {}: {}", output.status, line(command)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<String> = words.map(|word| shown(Path::new(word)).to_string()).collect();
    words.join(" ")
}

/// A C or C++ compiler that was found to work.
#[derive(Clone, Debug)]
pub struct Compiler {
    /// As called: `gcc`, or the value of `CC`.
    pub name: String,
    /// The first line of `--version` after the program's name.
    pub version: String,
}

impl Compiler {
    /// The compiler called `name`, which may carry arguments (`ccache gcc`).
    fn find(name: &str) -> Option<Compiler> {
        let mut words = name.split_whitespace();
        let output = Command::new(words.next()?)
            .args(words)
            .arg("--version")
            .stderr(Stdio::null())
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let (program, version) = text.lines().next()?.split_once(' ')?;
        // gcc says "gcc (Debian ...) ..." or "cc (Debian ...) ..."; of clang every word counts.
        let version = if version.starts_with('(') {
            version.to_string()
        } else {
            format!("{program} {version}")
        };
        output.status.success().then(|| Compiler { name: name.to_string(), version })
    }

    pub fn is_clang(&self) -> bool {
        self.version.contains("clang")
    }

    /// Whether a program is compiled and linked with these flags.
    pub fn links_with(&self, flags: &[&str]) -> Result<bool> {
        let directory = target().join("xtask");
        make_directory(&directory)?;
        let source = directory.join("probe.c");
        std::fs::write(&source, "int main(void) { return 0; }\n")
            .map_err(|error| format!("cannot write {}: {error}", shown(&source)))?;
        let mut command = self.command();
        command.args(flags).args(["-x", "c"]).arg(&source).arg("-o").arg(directory.join("probe"));
        let output =
            command.output().map_err(|error| format!("cannot start a compiler: {error}"))?;
        Ok(output.status.success())
    }

    pub fn command(&self) -> Command {
        let mut words = self.name.split_whitespace();
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).current_dir(root());
        command
    }
}

/// A language's compilers: the environment variable that names one, and the usual names.
pub struct Language {
    pub name: &'static str,
    pub variable: &'static str,
    pub names: [&'static str; 3],
}

pub const C: Language = Language { name: "C", variable: "CC", names: ["cc", "gcc", "clang"] };

pub const CPP: Language =
    Language { name: "C++", variable: "CXX", names: ["c++", "g++", "clang++"] };

impl Language {
    fn chosen(&self) -> Result<Option<Compiler>> {
        match std::env::var(self.variable) {
            Ok(name) if !name.trim().is_empty() => Compiler::find(&name)
                .map(Some)
                .ok_or_else(|| format!("{}={name} is not a compiler that runs", self.variable)),
            _ => Ok(None),
        }
    }

    fn missing(&self) -> String {
        format!(
            "no {} compiler found: tried {} (set {} to name one)",
            self.name,
            self.names.join(", "),
            self.variable
        )
    }

    /// The compiler to use: the environment's, else the first of the usual ones.
    pub fn compiler(&self) -> Result<Compiler> {
        if let Some(compiler) = self.chosen()? {
            return Ok(compiler);
        }
        self.names.iter().find_map(|name| Compiler::find(name)).ok_or_else(|| self.missing())
    }

    /// Every compiler there is, each once, and a note on each usual one that is absent.
    pub fn compilers(&self) -> Result<(Vec<Compiler>, Vec<String>)> {
        let mut found: Vec<Compiler> = self.chosen()?.into_iter().collect();
        let mut absent = Vec::new();
        for name in self.names {
            match Compiler::find(name) {
                // `cc` is most often one of the others.
                Some(one) if found.iter().any(|other| other.version == one.version) => {}
                Some(one) => found.push(one),
                None => absent.push(format!("{name} not found")),
            }
        }
        if found.is_empty() { Err(self.missing()) } else { Ok((found, absent)) }
    }
}
