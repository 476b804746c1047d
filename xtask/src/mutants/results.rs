//! What became of each mutant, kept from one run to the next.

use super::Site;
use crate::tool::{Result, root, target};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// By that test.
    Caught(String),
    /// Every test that meets it passes.
    Survives,
    /// No test comes by, or to none does it make a difference.
    NotMet,
    DoesNotCompile,
}

impl Verdict {
    pub fn text(&self) -> String {
        match self {
            Verdict::Caught(by) => format!("caught by {by}"),
            Verdict::Survives => "survives".to_string(),
            Verdict::NotMet => "not met".to_string(),
            Verdict::DoesNotCompile => "does not compile".to_string(),
        }
    }

    fn from(text: &str) -> Option<Verdict> {
        match text {
            "survives" => Some(Verdict::Survives),
            "not met" => Some(Verdict::NotMet),
            "does not compile" => Some(Verdict::DoesNotCompile),
            _ => text.strip_prefix("caught by ").map(|by| Verdict::Caught(by.to_string())),
        }
    }

    fn is_caught(&self) -> bool {
        matches!(self, Verdict::Caught(_))
    }
}

/// A line each: what the function was, the verdict, the mutant's name, with tabs between them.
fn path() -> PathBuf {
    target().join("mutants/results.txt")
}

pub struct Results {
    known: Mutex<BTreeMap<String, Verdict>>,
    /// Names that `tests/survivors.txt` lists, each with a line that says why it is equivalent; with
    /// a `*` at its end one stands for all that begin so.
    equivalent: Vec<String>,
}

impl Results {
    pub fn read(sites: &[Site]) -> Result<Results> {
        let around: BTreeMap<_, _> = sites.iter().map(|site| (site.name(), site.around)).collect();
        let mut known = BTreeMap::new();
        for line in fs::read_to_string(path()).unwrap_or_default().lines() {
            let mut parts = line.splitn(3, '\t');
            let (Some(number), Some(verdict), Some(name)) =
                (parts.next(), parts.next(), parts.next())
            else {
                continue;
            };
            let is_same = around.get(name).is_some_and(|around| around.to_string() == number);
            if let Some(verdict) = Verdict::from(verdict).filter(|_| is_same) {
                known.insert(name.to_string(), verdict);
            }
        }
        let list = fs::read_to_string(root().join("tests/survivors.txt"))
            .map_err(|error| format!("tests/survivors.txt: {error}"))?;
        let names = list.lines().filter(|line| line.starts_with("src/"));
        let equivalent = names.map(str::to_string).collect();
        Ok(Results { known: Mutex::new(known), equivalent })
    }

    fn is_equivalent(&self, name: &str) -> bool {
        self.equivalent.iter().any(|listed| match listed.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => listed == name,
        })
    }

    /// Whether it need not be run: it was, and did not live if it is `again`; or nothing can see it.
    pub fn has(&self, site: &Site, again: bool) -> bool {
        let name = site.name();
        let known = self.known.lock().expect("not poisoned");
        let verdict = known.get(&name);
        self.is_equivalent(&name)
            || verdict.is_some_and(|verdict| {
                !again || verdict.is_caught() || *verdict == Verdict::DoesNotCompile
            })
    }

    pub fn add(&self, site: &Site, verdict: Verdict) -> Result {
        let name = site.name();
        let line = format!("{}\t{}\t{name}\n", site.around, verdict.text());
        let mut known = self.known.lock().expect("not poisoned");
        known.insert(name, verdict);
        fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path())
            .and_then(|mut file| file.write_all(line.as_bytes()))
            .map_err(|error| format!("cannot write {}: {error}", path().display()))
    }

    /// Prints what is open among these, and how many of each file are what.
    pub fn report(&self, sites: &[Site]) -> Result {
        let known = self.known.lock().expect("not poisoned");
        let mut counts = BTreeMap::<&str, [usize; 6]>::new();
        for site in sites {
            let name = site.name();
            let listed = self.is_equivalent(&name);
            let verdict = known.get(&name);
            let kind = match verdict {
                Some(Verdict::Caught(_)) => 0,
                Some(Verdict::DoesNotCompile) => 5,
                _ if listed => 1,
                None => 4,
                Some(Verdict::Survives) => 2,
                Some(Verdict::NotMet) => 3,
            };
            counts.entry(site.file).or_default()[kind] += 1;
            counts.entry("all").or_default()[kind] += 1;
            if let (2 | 3, Some(verdict)) = (kind, verdict) {
                println!("{}: {}:{}: {}", verdict.text(), site.file, site.line, site.what);
            }
            if listed && verdict.is_some_and(Verdict::is_caught) {
                println!("caught, though listed as equivalent: {name}");
            }
        }
        println!("caught, equivalent, surviving, not met, not run, not compiling:");
        for (file, counts) in &counts {
            let counts: String = counts.iter().map(|count| format!("{count:6}")).collect();
            println!("{counts}  {file}");
        }
        let open = counts.get("all").map_or(0, |counts| counts[2] + counts[3]);
        if open == 0 { Ok(()) } else { Err(format!("{open} mutants live")) }
    }
}
