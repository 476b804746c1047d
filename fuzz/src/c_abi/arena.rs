//! Memory between inaccessible pages.

use std::ops::Range;
use std::ptr;

const PAGE: usize = 4096;

/// Bytes of a region.
pub const BYTES: usize = 4 * PAGE;

/// A mapping between two inaccessible pages.
pub struct Region {
    start: *mut u8,
}

impl Region {
    fn new() -> Region {
        // SAFETY: the mapping is new, and the part that becomes accessible lies inside it.
        unsafe {
            let (kind, none) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::PROT_NONE);
            let all = libc::mmap(ptr::null_mut(), BYTES + 2 * PAGE, none, kind, -1, 0);
            assert!(all != libc::MAP_FAILED, "mmap");
            let start = all.cast::<u8>().add(PAGE);
            let access = libc::PROT_READ | libc::PROT_WRITE;
            assert!(libc::mprotect(start.cast(), BYTES, access) == 0, "mprotect");
            Region { start }
        }
    }

    pub fn start(&self) -> usize {
        self.start as usize
    }

    pub fn end(&self) -> usize {
        self.start() + BYTES
    }

    /// Whether the region contains all of these bytes.
    pub fn contains(&self, bytes: &Range<usize>) -> bool {
        self.start() <= bytes.start && bytes.start <= bytes.end && bytes.end <= self.end()
    }

    pub fn fill(&mut self, byte: u8) {
        // SAFETY: the slice covers the accessible part of the mapping that `new` made.
        unsafe { self.start.write_bytes(byte, BYTES) }
    }

    pub fn copy(&self) -> Vec<u8> {
        // SAFETY: the slice covers the accessible part of the mapping that `new` made; no call is running.
        unsafe { std::slice::from_raw_parts(self.start, BYTES) }.to_vec()
    }

    /// Writes bytes at an address in the region.
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(self.contains(&(at..at + bytes.len())));
        // SAFETY: the assertion above checked that the bytes lie in the region.
        unsafe { self.start.add(at - self.start()).copy_from(bytes.as_ptr(), bytes.len()) }
    }
}

/// All memory that a call may get.
pub struct Arena {
    pub regions: Vec<Region>,
}

impl Arena {
    pub fn new(regions: usize) -> Arena {
        Arena { regions: (0..regions).map(|_| Region::new()).collect() }
    }

    /// The region in which all of these bytes lie.
    pub fn find(&self, bytes: &Range<usize>) -> Option<usize> {
        self.regions.iter().position(|region| region.contains(bytes))
    }

    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            parts: self.regions.iter().map(|region| (region.start(), region.copy())).collect(),
        }
    }
}

/// The contents of the memory at some time.
pub struct Snapshot {
    parts: Vec<(usize, Vec<u8>)>,
}

impl Snapshot {
    /// `N` bytes from that address.
    pub fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        for (start, bytes) in &self.parts {
            if (*start..=start + BYTES - N).contains(&at) {
                return std::array::from_fn(|i| bytes[at - start + i]);
            }
        }
        panic!("{at:#x} is in no region");
    }

    /// The first address at which the two differ, except for addresses that may change.
    pub fn differs(&self, other: &Snapshot, may_change: &[Range<usize>]) -> Option<usize> {
        for ((start, before), (_, after)) in self.parts.iter().zip(&other.parts) {
            if before == after {
                continue;
            }
            let mut allowed = vec![false; BYTES];
            for bytes in may_change {
                let from = bytes.start.clamp(*start, start + BYTES) - start;
                let to = bytes.end.clamp(*start, start + BYTES) - start;
                allowed[from..to].fill(true);
            }
            let changed = (0..BYTES).find(|&i| before[i] != after[i] && !allowed[i]);
            if let Some(i) = changed {
                return Some(start + i);
            }
        }
        None
    }
}
