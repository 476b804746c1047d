//! Which mutant is on, and which are met: a part of the mutated copy, not of xtask.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

static ACTIVE: AtomicUsize = AtomicUsize::new(0);

/// Mutants whose place was come by; of a comparison, with another result than the original's.
static MET: [AtomicBool; 4096] = [const { AtomicBool::new(false) }; 4096];

/// Whether it is that one.
#[inline(always)]
pub fn is(mutant: usize) -> bool {
    // Looked at first: threads would pull the cache line to and fro.
    if !MET[mutant].load(Ordering::Relaxed) {
        MET[mutant].store(true, Ordering::Relaxed);
    }
    ACTIVE.load(Ordering::Relaxed) == mutant
}

/// What a comparison says, or the mutant's if it is that one.
#[inline(always)]
pub fn choose(mutant: usize, original: bool, mutated: bool) -> bool {
    if original == mutated {
        return original;
    }
    if is(mutant) { mutated } else { original }
}

/// Where to write which were met.
static TO: OnceLock<std::path::PathBuf> = OnceLock::new();

extern "C" fn start() {
    let number = std::env::var("XENT_MUTANT").ok().and_then(|n| n.parse().ok());
    ACTIVE.store(number.unwrap_or(0), Ordering::Relaxed);
    if let Some(path) = std::env::var_os("XENT_MUTANTS_MET") {
        let _ = TO.set(path.into());
    }
    // A test that panics ends its program at once: a mutant costs no more than its first failure.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        std::process::exit(101);
    }));
}

/// Appends, since a forked child ends as well.
extern "C" fn end() {
    let Some(path) = TO.get() else { return };
    let met = (0..MET.len()).filter(|&mutant| MET[mutant].load(Ordering::Relaxed));
    let list: String = met.map(|mutant| format!("{mutant}\n")).collect();
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    let _ = file.and_then(|mut file| file.write_all(list.as_bytes()));
}

// SAFETY: the loader calls what it finds here before `main`.
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

// SAFETY: and here, once the program ends.
#[used]
#[unsafe(link_section = ".fini_array")]
static END: extern "C" fn() = end;
