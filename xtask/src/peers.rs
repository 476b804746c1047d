//! `cargo xtask bench peers`: xent beside other libraries, in turns within one run. Each is a process
//! that stays and answers requests (peers/README.md has the protocol); one that cannot be installed
//! is printed as absent. No other command needs them.

use crate::c::Program;
use crate::dist;
use crate::picture;
use crate::tool::{C, CPP, Result, directory, quietly, root, shell, shown, target};
use anyhow::{Context, anyhow, bail, ensure};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use xshell::{Cmd, Shell, cmd};

#[path = "../../benches/common/machine.rs"]
mod machine;

/// The figures of the last run.
pub const RECORD: &str = "docs/data/peers.csv";

/// In the order in which they take their turns.
const PEERS: [&str; 10] = [
    "c", "onednn", "torch", "torch-warm", "torch-compile", "jax", "tensorflow", "candle", "burn",
    "xent",
];

type Shape = (usize, usize);

/// Rows and classes.
const SHAPES: [Shape; 3] = [(512, 32_000), (128, 128_256), (65_536, 10)];
const DTYPES: [&str; 2] = ["f32", "bf16"];
const KINDS: [&str; 3] = ["forward", "both", "in-place"];

/// `cargo xtask bench peers [--only NAME,...] [--threads N] [--rounds N] [--budget SECONDS]`. The budget is what a
/// peer may spend on a request.
pub fn run(arguments: &[&str]) -> Result {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (mut only, mut rounds, mut budget, mut threads) = (PEERS.to_vec(), 3, 0.15, cores);
    for pair in arguments.chunks(2) {
        match *pair {
            ["--only", names] => only = names.split(',').collect(),
            ["--rounds", number] => rounds = number.parse()?,
            ["--budget", seconds] => budget = seconds.parse()?,
            ["--threads", number] => threads = number.parse::<usize>()?.clamp(1, cores),
            _ => bail!("not understood: {}", pair.join(" ")),
        }
    }
    for name in &only {
        ensure!(PEERS.contains(name), "no peer is called {name}; there are: {}", PEERS.join(", "));
    }
    let sh = shell()?;
    let mut xent = Peer::start("xent", sh.cmd(xent(&sh, "xent")?), threads)?;
    println!("xent {}", xent.version);
    let mut peers = Vec::new();
    for name in only.into_iter().filter(|name| *name != "xent") {
        match command(&sh, name).and_then(|command| Peer::start(name, command, threads)) {
            Ok(peer) => {
                println!("{name} {}", peer.version);
                peers.push(peer);
            }
            // The other lines are a compiler's.
            Err(reason) => {
                println!("{name} absent: {}", format!("{reason:#}").lines().next().unwrap_or("?"));
            }
        }
    }

    let mut table = Table::default();
    for dtype in DTYPES {
        for shape in SHAPES {
            for round in 0..rounds {
                for peer in &mut peers {
                    table.turns(&mut xent, peer, shape, dtype, round, budget)?;
                }
            }
            table.print(shape, dtype);
        }
    }
    let text = table.record(&xent, &peers, threads)?;
    table.judge();
    // Other options than the default's are for trying out.
    let trial = !arguments.is_empty();
    let path = if trial { directory("peers")?.join("peers.csv") } else { root().join(RECORD) };
    sh.write_file(&path, text)?;
    println!("recorded in {}", shown(&path));
    if trial { Ok(()) } else { picture::draw() }
}

/// A process that answers requests.
struct Peer {
    name: &'static str,
    version: String,
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    fn start(name: &str, command: Cmd, threads: usize) -> Result<Peer> {
        let name = *PEERS.iter().find(|peer| **peer == name).context("no such peer")?;
        let command = Command::from(command);
        // Some take as many threads as they may run on, whatever they are told.
        let mut pinned = Command::new("taskset");
        pinned.arg("-c").arg(format!("0-{}", threads - 1));
        pinned.arg(command.get_program()).args(command.get_args()).current_dir(root());
        pinned.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        pinned.env("OMP_NUM_THREADS", threads.to_string());
        pinned.env("RAYON_NUM_THREADS", threads.to_string());
        pinned.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = pinned.spawn()?;
        let requests = child.stdin.take().context("has no pipes")?;
        let answers = BufReader::new(child.stdout.take().context("has no pipes")?);
        let mut peer = Peer { name, version: String::new(), child, requests, answers };
        peer.version = peer.line()?.strip_prefix("ready ").context("is not ready")?.to_string();
        Ok(peer)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.answers.read_line(&mut line)? > 0, "ended");
        match line.trim().strip_prefix("absent ") {
            Some(reason) => Err(anyhow!(reason.to_string())),
            None => Ok(line.trim().to_string()),
        }
    }

    /// Seconds of its fastest call, and the loss.
    fn ask(&mut self, shape: Shape, dtype: &str, kind: &str, budget: f64) -> Result<(f64, f64)> {
        writeln!(self.requests, "run {} {} {dtype} {kind} {budget}", shape.0, shape.1)?;
        let line = self.line()?;
        // OpenMP's threads spin for a while after a call: they shall not run beside the next one.
        std::thread::sleep(std::time::Duration::from_millis(30));
        let (time, loss) = line.split_once(' ').with_context(|| format!("answered {line}"))?;
        Ok((time.parse()?, loss.parse()?))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // A peer ends with its input; one that hangs is not waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One turn: a peer's time, and that of xent beside it.
struct Turn {
    peer: &'static str,
    dtype: &'static str,
    shape: Shape,
    kind: &'static str,
    theirs: f64,
    ours: f64,
}

#[derive(Default)]
struct Table(Vec<Turn>);

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

impl Table {
    fn of(
        &self,
        peer: &str,
        dtype: &str,
        shape: Shape,
        kind: &str,
    ) -> impl DoubleEndedIterator<Item = &Turn> + Clone {
        let is_it = move |turn: &&Turn| {
            turn.peer == peer && turn.dtype == dtype && turn.shape == shape && turn.kind == kind
        };
        self.0.iter().filter(is_it)
    }

    /// Each kind by xent, and at once by the peer.
    fn turns(
        &mut self,
        xent: &mut Peer,
        peer: &mut Peer,
        shape: Shape,
        dtype: &'static str,
        round: usize,
        budget: f64,
    ) -> Result {
        for kind in KINDS {
            let ours = xent.ask(shape, dtype, kind, budget).context("xent")?;
            let theirs = match peer.ask(shape, dtype, kind, budget) {
                Ok(theirs) => theirs,
                // A user of a library without calls in place takes the call out of place.
                Err(_) if kind == "in-place" => {
                    match self.of(peer.name, dtype, shape, "both").next_back() {
                        Some(turn) => (turn.theirs, ours.1),
                        None => continue,
                    }
                }
                Err(reason) => {
                    if round == 0 {
                        println!("{} absent for {dtype}: {reason:#}", peer.name);
                    }
                    return Ok(());
                }
            };
            // A peer that computes something else would be no peer; halves round the loss.
            let tolerance = if dtype == "f32" { 1e-4 } else { 2e-2 };
            if (theirs.1 - ours.1).abs() > tolerance * ours.1.abs() {
                println!("{}: a loss of {} instead of {}", peer.name, theirs.1, ours.1);
            }
            let (theirs, ours) = (theirs.0, ours.0);
            self.0.push(Turn { peer: peer.name, dtype, shape, kind, theirs, ours });
        }
        Ok(())
    }

    /// Median times of a peer and of xent, and the median of their ratios.
    fn figures(&self, peer: &str, dtype: &str, shape: Shape, kind: &str) -> Option<[f64; 3]> {
        let turns = self.of(peer, dtype, shape, kind);
        Some([
            median(turns.clone().map(|turn| turn.theirs))?,
            median(turns.clone().map(|turn| turn.ours))?,
            median(turns.map(|turn| turn.theirs / turn.ours))?,
        ])
    }

    fn print(&self, shape: Shape, dtype: &str) {
        println!("\n{dtype} {}x{}: milliseconds, and how many times xent's", shape.0, shape.1);
        println!("{:<14} {:>17} {:>17} {:>17}", "", KINDS[0], KINDS[1], KINDS[2]);
        for peer in PEERS {
            let cell = |kind| match self.figures(peer, dtype, shape, kind) {
                Some([theirs, _, ratio]) => format!("{:.2} ({ratio:.1}x)", theirs * 1e3),
                None => String::new(),
            };
            let cells = KINDS.map(cell);
            if cells.iter().any(|cell| !cell.is_empty()) {
                println!("{peer:<14} {:>17} {:>17} {:>17}", cells[0], cells[1], cells[2]);
            }
        }
    }

    /// The file: a line for each peer, and one for xent, whose time is the median beside all peers.
    fn record(&self, xent: &Peer, peers: &[Peer], threads: usize) -> Result<String> {
        let mut text = format!("# machine: {}, {threads} threads\n", machine::processor());
        writeln!(text, "# date: {}", machine::date())?;
        for peer in std::iter::once(xent).chain(peers) {
            writeln!(text, "# {}: {}", peer.name, peer.version)?;
        }
        text += "# ratio: time over xent's in the same turn, median of turns\n";
        text += "peer,dtype,shape,kind,threads,ms,ratio\n";
        for dtype in DTYPES {
            for (shape, kind) in SHAPES.iter().flat_map(|shape| KINDS.map(|kind| (*shape, kind))) {
                let mut lines = Vec::new();
                for peer in PEERS {
                    if let Some([time, ours, ratio]) = self.figures(peer, dtype, shape, kind) {
                        lines.push((peer, time, ours, ratio));
                    }
                }
                if let Some(ours) = median(lines.iter().map(|line| line.2)) {
                    lines.insert(0, ("xent", ours, ours, 1.0));
                }
                for (peer, time, _, ratio) in lines {
                    let ((rows, classes), time) = (shape, time * 1e3);
                    writeln!(
                        text,
                        "{peer},{dtype},{rows}x{classes},{kind},{threads},{time:.4},{ratio:.2}"
                    )?;
                }
            }
        }
        Ok(text)
    }

    /// The targets, each with the peer that decided.
    fn judge(&self) {
        type Row<'a> = (&'a str, &'a str, bool, &'a [&'a str], [f64; 3]);
        let rows: [Row; 6] = [
            ("best of all, C >= 1000", "f32", false, &PEERS, [2.8, 2.5, 3.8]),
            ("PyTorch, warm allocator", "f32", false, &["torch-warm"], [5.5, 7.0, 13.0]),
            ("PyTorch as installed", "f32", false, &["torch"], [12.0, 15.0, 28.0]),
            ("best of all, C >= 1000", "bf16", false, &PEERS, [5.0, 4.0, 4.0]),
            ("65536x10, best of all", "f32", true, &PEERS, [4.0, 4.0, 4.0]),
            ("65536x10, best of all", "bf16", true, &PEERS, [4.0, 4.0, 4.0]),
        ];
        println!("\nratios to reach");
        for (what, dtype, narrow, peers, targets) in rows {
            for (kind, target) in KINDS.into_iter().zip(targets) {
                let shapes = SHAPES.into_iter().filter(|shape| (shape.1 < 1000) == narrow);
                let all = shapes.flat_map(|shape| peers.iter().map(move |peer| (*peer, shape)));
                let ratios = all.filter_map(|(peer, shape)| {
                    Some((self.figures(peer, dtype, shape, kind)?[2], peer, shape))
                });
                if let Some((ratio, peer, shape)) = ratios.min_by(|a, b| a.0.total_cmp(&b.0)) {
                    let verdict = if ratio >= target { "pass" } else { "falls short" };
                    let (rows, classes) = shape;
                    println!(
                        "{what:<24} {dtype:<5} {kind:<9} {ratio:6.2}  >= {target:<5} {verdict}  \
                         ({peer}, {rows}x{classes})"
                    );
                }
            }
        }
    }
}

/// `cargo xtask bench linear [OPTION VALUE]...`: linear layers beside PyTorch's (peers/python/linear.py).
pub fn linear(options: &[&str]) -> Result {
    let (sh, trial) = (shell()?, !options.is_empty());
    let (python, program) = (python(&sh)?, xent(&sh, "linear")?);
    let record = if trial { "target/peers/linear.csv" } else { "docs/data/linear.csv" };
    let script = "peers/python/linear.py";
    Ok(cmd!(sh, "{python} {script} {program} --record {record} {options...}").run()?)
}

/// Builds a program of peers/c with xent.
fn xent(sh: &Shell, name: &str) -> Result<PathBuf> {
    let library = Program::statically(&dist::build(&target().join("dist"))?.static_library());
    let (source, program) = (format!("peers/c/{name}.c"), directory("peers")?.join(name));
    let compile = C.compiler(sh)?.command(sh).args(["-std=gnu11", "-O2", "-Iinclude"]);
    quietly(compile.arg(source).args(library).arg("-o").arg(&program))?;
    Ok(program)
}

/// Builds or installs a peer.
fn command<'a>(sh: &'a Shell, name: &str) -> Result<Cmd<'a>> {
    let directory = directory("peers")?;
    match name {
        "c" => {
            let program = directory.join("plain");
            let flags =
                ["-std=gnu11", "-Ofast", "-march=native", "-mprefer-vector-width=512", "-fopenmp"];
            quietly(cmd!(sh, "gcc {flags...} peers/c/plain.c -lm -o {program}"))?;
            Ok(sh.cmd(program))
        }
        "onednn" => {
            let python = python(sh)?;
            let environment = python.ancestors().nth(2).unwrap_or(&directory);
            let (include, lib) = (environment.join("include"), environment.join("lib"));
            let program = directory.join("onednn");
            let compile = CPP.compiler(sh)?.command(sh).args(["-std=c++17", "-O2", "-I"]);
            let compile = compile.arg(&include).arg("-I").arg(include.join("oneapi/dnnl"));
            let compile = compile.arg("peers/onednn/onednn.cpp").arg("-L").arg(&lib);
            let compile = compile.arg(format!("-Wl,-rpath,{}", lib.display())).arg("-ldnnl");
            quietly(compile.args(["-Wl,--allow-shlib-undefined", "-o"]).arg(&program))?;
            // Its runtime finds the processor by this.
            let command = sh.cmd(program).env("OCL_ICD_FILENAMES", lib.join("libintelocl.so"));
            Ok(command.env("LD_LIBRARY_PATH", lib))
        }
        "candle" | "burn" => {
            let package = format!("peer-{name}");
            println!("building {package}");
            let products = directory.join("rust");
            let manifest = "peers/rust/Cargo.toml";
            let build = cmd!(
                sh,
                "cargo build --release --locked --manifest-path {manifest} --package {package}"
            );
            // For this processor, as the others are.
            let build = build.env("RUSTFLAGS", "-C target-cpu=native");
            quietly(build.env("CARGO_TARGET_DIR", &products))?;
            Ok(sh.cmd(products.join("release").join(package)))
        }
        _ => {
            let command = sh.cmd(python(sh)?).arg("peers/python/peer.py").arg(name);
            if name == "torch" || !name.starts_with("torch") {
                return Ok(command);
            }
            // As an allocator that caches: malloc keeps freed memory, and the kernel clears no page anew.
            Ok(command
                .env("MALLOC_MMAP_MAX_", "0")
                .env("MALLOC_TRIM_THRESHOLD_", "68719476736")
                .env("MALLOC_TOP_PAD_", "67108864"))
        }
    }
}

/// The Python of an environment that has peers/requirements.txt, made once.
pub fn python(sh: &Shell) -> Result<PathBuf> {
    let wanted = sh.read_file("peers/requirements.txt")?;
    let environment = directory("peers")?.join("venv");
    let python = environment.join("bin/python");
    let done = environment.join("installed.txt");
    if sh.read_file(&done).is_ok_and(|installed| installed == wanted) {
        return Ok(python);
    }
    println!("installing peers/requirements.txt into {}", shown(&environment));
    quietly(cmd!(sh, "python3 -m venv {environment}"))?;
    // One by one: a package that cannot be installed shall not keep the others out.
    for line in wanted.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let options = ["install", "--quiet", "--disable-pip-version-check"];
        if let Err(reason) = quietly(cmd!(sh, "{python} -m pip {options...} {line}")) {
            println!("not installed: {line}: {}", reason.to_string().lines().next().unwrap_or("?"));
        }
    }
    sh.write_file(&done, wanted)?;
    Ok(python)
}
