//! `cargo xtask bench peers`: xent beside other libraries, in turns within one run. Each is a process
//! that stays and answers requests (peers/README.md has the protocol); one that cannot be installed
//! is printed as absent. Nothing of theirs is part of any other command.

use crate::dist::{self, SYSTEM_LIBRARIES};
use crate::picture;
use crate::tool::{self, C, CPP, Result, make_directory, root, shown, target};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

#[path = "../../benches/common/machine.rs"]
mod machine;

/// What the last run measured.
pub const RECORD: &str = "docs/data/peers.csv";

/// In the order in which they take their turns.
const PEERS: [&str; 10] = [
    "c",
    "onednn",
    "torch",
    "torch-warm",
    "torch-compile",
    "jax",
    "tensorflow",
    "candle",
    "burn",
    "xent",
];

/// Rows and classes.
const SHAPES: [(usize, usize); 3] = [(512, 32_000), (128, 128_256), (65_536, 10)];

const KINDS: [&str; 3] = ["forward", "both", "in-place"];

/// What a run is to do.
struct Options<'a> {
    only: Vec<&'a str>,
    rounds: usize,
    /// Seconds that a peer may spend on a request.
    budget: f64,
    threads: usize,
    trial: bool,
}

/// `cargo xtask bench peers [--only NAME,...] [--threads N] [--rounds N] [--budget SECONDS]`.
pub fn run(arguments: &[&str]) -> Result {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut options =
        Options { only: PEERS.to_vec(), rounds: 3, budget: 0.15, threads: cores, trial: false };
    let mut arguments = arguments.iter();
    while let Some(option) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{option} needs a value"))?;
        let number =
            || value.parse::<f64>().map_err(|_| format!("{option}: not a number: {value}"));
        match *option {
            "--only" => options.only = value.split(',').collect(),
            "--rounds" => options.rounds = number()? as usize,
            "--budget" => options.budget = number()?,
            "--threads" => options.threads = (number()? as usize).clamp(1, cores),
            other => return Err(format!("not understood: {other}")),
        }
        // A part of it is no record.
        options.trial = true;
    }
    if let Some(name) = options.only.iter().find(|name| !PEERS.contains(name)) {
        return Err(format!("no peer is called {name}; there are: {}", PEERS.join(", ")));
    }
    measure(&options)
}

fn measure(options: &Options) -> Result {
    let directory = target().join("peers");
    make_directory(&directory)?;
    let mut xent = Peer::start("xent", xent(&directory)?, options.threads)?;
    println!("xent {}", xent.version);
    let mut peers = Vec::new();
    for &name in options.only.iter().filter(|name| **name != "xent") {
        let started = command(name, &directory)
            .and_then(|command| Peer::start(name, command, options.threads));
        match started {
            Ok(peer) => {
                println!("{name} {}", peer.version);
                peers.push(peer);
            }
            Err(reason) => println!("{name} absent: {}", first_line(&reason)),
        }
    }

    let mut table = Table::default();
    for dtype in ["f32", "bf16"] {
        for shape in SHAPES {
            for round in 0..options.rounds {
                for peer in &mut peers {
                    pair(&mut xent, peer, shape, dtype, round, options.budget, &mut table);
                }
            }
            table.print(shape, dtype);
        }
    }
    let text = table.record(&xent, &peers, options.threads);
    table.judge();
    let path = if options.trial { directory.join("peers.csv") } else { root().join(RECORD) };
    make_directory(path.parent().unwrap_or(&path))?;
    fs::write(&path, text).map_err(|error| format!("cannot write {}: {error}", shown(&path)))?;
    println!("recorded in {}", shown(&path));
    if options.trial { Ok(()) } else { picture::draw() }
}

/// The first line of a message: the rest is a compiler's.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or(text)
}

/// One turn: each kind by xent, and at once by the peer.
fn pair(
    xent: &mut Peer,
    peer: &mut Peer,
    shape: (usize, usize),
    dtype: &'static str,
    round: usize,
    budget: f64,
    table: &mut Table,
) {
    for kind in KINDS {
        let ours = match xent.ask(shape, dtype, kind, budget) {
            Ok(ours) => ours,
            Err(reason) => return println!("xent absent: {reason}"),
        };
        // Where there is nothing in place, what it does out of place is what one would use.
        let theirs = match peer.ask(shape, dtype, kind, budget) {
            Err(_) if kind == "in-place" => {
                table.last(&peer.name, shape, dtype, "both").map(|time| (time, ours.1))
            }
            Err(reason) => {
                if round == 0 {
                    println!("{} absent for {dtype}: {reason}", peer.name);
                }
                return;
            }
            Ok(theirs) => Some(theirs),
        };
        let Some(theirs) = theirs else { continue };
        // A peer that computes something else would be no peer; halves round the loss.
        let tolerance = if dtype == "f32" { 1e-4 } else { 2e-2 };
        if (theirs.1 - ours.1).abs() > tolerance * ours.1.abs() {
            println!("{}: a loss of {} instead of {}", peer.name, theirs.1, ours.1);
        }
        table.add(&peer.name, shape, dtype, kind, theirs.0, ours.0);
    }
}

/// A process that answers requests.
struct Peer {
    name: String,
    version: String,
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    fn start(name: &str, command: Command, threads: usize) -> Result<Peer> {
        // Some take as many threads as they may run on, whatever they are told.
        let mut pinned = Command::new("taskset");
        pinned.arg("-c").arg(format!("0-{}", threads - 1));
        pinned.arg(command.get_program()).args(command.get_args());
        pinned.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let mut child = pinned
            .env("OMP_NUM_THREADS", threads.to_string())
            .env("RAYON_NUM_THREADS", threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("cannot start: {error}"))?;
        let (Some(requests), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("has no pipes".to_string());
        };
        let answers = BufReader::new(answers);
        let mut peer =
            Peer { name: name.to_string(), version: String::new(), child, requests, answers };
        peer.version = match peer.line()?.strip_prefix("ready ") {
            Some(version) => version.to_string(),
            None => return Err("is not ready".to_string()),
        };
        Ok(peer)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        match self.answers.read_line(&mut line) {
            Ok(0) | Err(_) => Err("ended".to_string()),
            Ok(_) => match line.trim().strip_prefix("absent ") {
                Some(reason) => Err(reason.to_string()),
                None => Ok(line.trim().to_string()),
            },
        }
    }

    /// Seconds of its fastest call, and the loss.
    fn ask(
        &mut self,
        (rows, classes): (usize, usize),
        dtype: &str,
        kind: &str,
        budget: f64,
    ) -> Result<(f64, f64)> {
        writeln!(self.requests, "run {rows} {classes} {dtype} {kind} {budget}")
            .map_err(|_| "ended".to_string())?;
        let line = self.line()?;
        let answer = line
            .split_once(' ')
            .and_then(|(time, loss)| Some((time.parse::<f64>().ok()?, loss.parse::<f64>().ok()?)));
        // Whatever it waits with (OpenMP's threads spin for a while) shall not run beside the next.
        std::thread::sleep(std::time::Duration::from_millis(30));
        answer.ok_or_else(|| format!("answered {line}"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It ends with its input; one that hangs is not waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

type Key = (&'static str, (usize, usize), &'static str, String);

/// Times of a peer and of xent beside it, by dtype, shape, kind and peer.
#[derive(Default)]
struct Table(BTreeMap<Key, Vec<(f64, f64)>>);

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl Table {
    fn add(
        &mut self,
        peer: &str,
        shape: (usize, usize),
        dtype: &'static str,
        kind: &'static str,
        theirs: f64,
        ours: f64,
    ) {
        self.0.entry((dtype, shape, kind, peer.to_string())).or_default().push((theirs, ours));
    }

    fn last(
        &self,
        peer: &str,
        shape: (usize, usize),
        dtype: &'static str,
        kind: &'static str,
    ) -> Option<f64> {
        Some(self.0.get(&(dtype, shape, kind, peer.to_string()))?.last()?.0)
    }

    /// Median times of a peer and of xent, and the median of their ratios.
    fn figures(&self, key: &Key) -> Option<[f64; 3]> {
        let turns = self.0.get(key)?;
        let of = |f: &dyn Fn(&(f64, f64)) -> f64| median(turns.iter().map(f).collect());
        Some([of(&|t| t.0), of(&|t| t.1), of(&|t| t.0 / t.1)])
    }

    fn print(&self, (rows, classes): (usize, usize), dtype: &'static str) {
        println!("\n{dtype} {rows}x{classes}: milliseconds, and how many times xent's");
        println!("{:<14} {:>17} {:>17} {:>17}", "", KINDS[0], KINDS[1], KINDS[2]);
        for peer in PEERS {
            let mut line = String::new();
            for kind in KINDS {
                let key = (dtype, (rows, classes), kind, peer.to_string());
                let text = match self.figures(&key) {
                    Some([theirs, _, ratio]) => format!("{:.2} ({ratio:.1}x)", theirs * 1e3),
                    None => String::new(),
                };
                let _ = write!(line, " {text:>17}");
            }
            if !line.trim().is_empty() {
                println!("{peer:<14}{line}");
            }
        }
    }

    /// The file: a line for each peer, and one for xent, whose time is the median beside all peers.
    fn record(&self, xent: &Peer, peers: &[Peer], threads: usize) -> String {
        let mut text = format!("# machine: {}, {threads} threads\n", machine::processor());
        let _ = writeln!(text, "# date: {}", machine::date());
        let _ = writeln!(text, "# xent: {}", xent.version);
        for peer in peers {
            let _ = writeln!(text, "# {}: {}", peer.name, peer.version);
        }
        text += "# ratio: time over xent's in the same turn, median of turns\n";
        text += "peer,dtype,shape,kind,threads,ms,ratio\n";
        for dtype in ["f32", "bf16"] {
            for (shape @ (rows, classes), kind) in
                SHAPES.into_iter().flat_map(|shape| KINDS.map(|kind| (shape, kind)))
            {
                let mut ours = Vec::new();
                let mut lines = String::new();
                for peer in PEERS {
                    let key = (dtype, shape, kind, peer.to_string());
                    let Some([time, xent, ratio]) = self.figures(&key) else { continue };
                    ours.push(xent);
                    let _ = writeln!(
                        lines,
                        "{peer},{dtype},{rows}x{classes},{kind},{threads},{:.4},{ratio:.2}",
                        time * 1e3
                    );
                }
                if !ours.is_empty() {
                    let ours = median(ours) * 1e3;
                    let _ = writeln!(
                        text,
                        "xent,{dtype},{rows}x{classes},{kind},{threads},{ours:.4},1.00"
                    );
                    text += &lines;
                }
            }
        }
        text
    }

    /// The lowest ratio of these peers over shapes.
    fn lowest(&self, dtype: &str, kind: &str, narrow: bool, peers: &[&str]) -> Option<(f64, Key)> {
        let keys = self.0.keys().filter(|(its_dtype, (_, classes), its_kind, peer)| {
            *its_dtype == dtype
                && *its_kind == kind
                && (*classes < 1000) == narrow
                && peers.contains(&peer.as_str())
        });
        keys.filter_map(|key| Some((self.figures(key)?[2], key.clone())))
            .min_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// The targets, each with the peer that decided.
    fn judge(&self) {
        let torch = ["torch"];
        let warm = ["torch-warm"];
        type Row<'a> = (&'a str, &'a str, bool, &'a [&'a str], [f64; 3]);
        let rows: [Row; 6] = [
            ("best of all, C >= 1000", "f32", false, &PEERS, [2.8, 2.5, 3.8]),
            ("PyTorch, warm allocator", "f32", false, &warm, [5.5, 7.0, 13.0]),
            ("PyTorch as installed", "f32", false, &torch, [12.0, 15.0, 28.0]),
            ("best of all, C >= 1000", "bf16", false, &PEERS, [5.0, 4.0, 4.0]),
            ("65536x10, best of all", "f32", true, &PEERS, [4.0, 4.0, 4.0]),
            ("65536x10, best of all", "bf16", true, &PEERS, [4.0, 4.0, 4.0]),
        ];
        println!("\nratios to reach");
        for (what, dtype, narrow, peers, targets) in rows {
            for (kind, target) in KINDS.into_iter().zip(targets) {
                let Some((ratio, (_, (rows, classes), _, peer))) =
                    self.lowest(dtype, kind, narrow, peers)
                else {
                    continue;
                };
                let verdict = if ratio >= target { "pass" } else { "falls short" };
                println!(
                    "{what:<24} {dtype:<5} {kind:<9} {ratio:6.2}  >= {target:<5} {verdict}  ({peer}, {rows}x{classes})"
                );
            }
        }
    }
}

fn xent(directory: &Path) -> Result<Command> {
    let dist = dist::build(&target().join("dist"))?;
    let program = directory.join("xent");
    tool::run_quietly(
        C.compiler()?
            .command()
            .args(["-std=gnu11", "-O2", "-I"])
            .arg(&dist.include)
            .arg(root().join("peers/c/xent.c"))
            .arg(dist.static_library())
            .args(SYSTEM_LIBRARIES)
            .arg("-o")
            .arg(&program),
    )?;
    Ok(Command::new(program))
}

/// Builds or installs a peer, or says why not.
fn command(name: &str, directory: &Path) -> Result<Command> {
    match name {
        "c" => plain(directory),
        "onednn" => onednn(directory),
        "candle" | "burn" => rust(name, directory),
        _ => {
            let mut command = Command::new(python(directory)?);
            command.arg(root().join("peers/python/peer.py")).arg(name);
            if name != "torch" && name.starts_with("torch") {
                // Freed memory is kept, as by an allocator that caches: no page is cleared anew.
                command
                    .env("MALLOC_MMAP_MAX_", "0")
                    .env("MALLOC_TRIM_THRESHOLD_", "68719476736")
                    .env("MALLOC_TOP_PAD_", "67108864");
            }
            Ok(command)
        }
    }
}

fn plain(directory: &Path) -> Result<Command> {
    let program = directory.join("plain");
    tool::run_quietly(
        Command::new("gcc")
            .args([
                "-std=gnu11",
                "-Ofast",
                "-march=native",
                "-mprefer-vector-width=512",
                "-fopenmp",
            ])
            .arg(root().join("peers/c/plain.c"))
            .args(["-lm", "-o"])
            .arg(&program),
    )?;
    Ok(Command::new(program))
}

fn onednn(directory: &Path) -> Result<Command> {
    let python = python(directory)?;
    let environment = python.ancestors().nth(2).unwrap_or(directory);
    let (include, lib) = (environment.join("include"), environment.join("lib"));
    let program = directory.join("onednn");
    tool::run_quietly(
        CPP.compiler()?
            .command()
            .args(["-std=c++17", "-O2", "-I"])
            .arg(&include)
            .arg("-I")
            .arg(include.join("oneapi/dnnl"))
            .arg(root().join("peers/onednn/onednn.cpp"))
            .arg("-L")
            .arg(&lib)
            .arg(format!("-Wl,-rpath,{}", lib.display()))
            .args(["-ldnnl", "-Wl,--allow-shlib-undefined", "-o"])
            .arg(&program),
    )?;
    let mut command = Command::new(program);
    // Its runtime finds the processor by this.
    command.env("OCL_ICD_FILENAMES", lib.join("libintelocl.so")).env("LD_LIBRARY_PATH", lib);
    Ok(command)
}

fn rust(name: &str, directory: &Path) -> Result<Command> {
    let package = format!("peer-{name}");
    println!("building {package}");
    tool::run_quietly(
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "--release", "--locked", "--package", &package])
            .current_dir(root().join("peers/rust"))
            .env("CARGO_TARGET_DIR", directory.join("rust"))
            // As the others are.
            .env("RUSTFLAGS", "-C target-cpu=native"),
    )?;
    Ok(Command::new(directory.join("rust/release").join(package)))
}

/// The Python of an environment that has peers/requirements.txt, made once.
pub fn python(directory: &Path) -> Result<PathBuf> {
    let requirements = root().join("peers/requirements.txt");
    let wanted = fs::read_to_string(&requirements)
        .map_err(|error| format!("cannot read {}: {error}", shown(&requirements)))?;
    let environment = directory.join("venv");
    let python = environment.join("bin/python");
    let done = environment.join("installed.txt");
    if fs::read_to_string(&done).is_ok_and(|installed| installed == wanted) {
        return Ok(python);
    }
    println!("installing {} into {}", shown(&requirements), shown(&environment));
    tool::run_quietly(Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
    // One by one: a package that is not to be had shall not keep the others out.
    for line in wanted.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let mut pip = Command::new(&python);
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", line]);
        if let Err(reason) = tool::run_quietly(&mut pip) {
            println!("not installed: {line}: {}", first_line(&reason));
        }
    }
    fs::write(&done, wanted).map_err(|error| format!("cannot write {}: {error}", shown(&done)))?;
    Ok(python)
}
