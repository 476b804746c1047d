//! Which mutant is on, and which are met: a part of the mutated copy, not of xtask.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

static ACTIVE: AtomicUsize = AtomicUsize::new(0);

/// Mutants whose place was come by; of a comparison, with another result than the original's.
static MET: Page = Page([const { AtomicBool::new(false) }; SIZE]);

const SIZE: usize = 4096;

/// Memory of its own, which may be shared with forked children.
#[repr(align(4096))]
struct Page([AtomicBool; SIZE]);

/// Whether it is that one.
#[inline(always)]
pub fn is(mutant: usize) -> bool {
    // Looked at first: threads would pull the cache line to and fro.
    if !MET.0[mutant].load(Ordering::Relaxed) {
        MET.0[mutant].store(true, Ordering::Relaxed);
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
        share();
    }
    // A test that panics ends its program at once: a mutant costs no more than its first failure.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        std::process::exit(101);
    }));
}

/// What a forked child meets is met, though it may end without a word.
fn share() {
    let (access, how) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: whole pages that hold nothing yet, replaced before anybody else runs; where pages are
    // larger it fails, and nothing is.
    unsafe {
        libc::mmap(MET.0.as_ptr().cast_mut().cast(), SIZE, access, how | libc::MAP_FIXED, -1, 0)
    };
}

/// Appends, since a forked child may end here as well.
extern "C" fn end() {
    let Some(path) = TO.get() else { return };
    let met = (0..SIZE).filter(|&mutant| MET.0[mutant].load(Ordering::Relaxed));
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
