//! The allocator of the C library: the system's, and a reserve.
//!
//! Rust's standard library and rayon end the process where an allocation of theirs fails. A call looks whether there
//! is memory before it gives them work ([`worker::has_memory`](crate::worker::has_memory)); memory that another
//! thread takes after that look comes from the reserve, as does the text of an error. A Rust program has its own
//! allocator, and this one is not in it: `cargo xtask dist` and cargo-c set `xent_c_library`.

use crate::worker::UNRESERVED;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of the reserve: some jobs for each of 64 threads, or what a small pool is made of.
const BYTES: usize = 64 * 1024;

/// Every block begins at a multiple of this, which no layout of the standard library's or rayon's exceeds.
const ALIGN: usize = 128;

#[repr(align(128))]
struct Room(UnsafeCell<[u8; BYTES]>);

// SAFETY: the blocks of `CLASSES` follow one another, and `Class::take` gives a block away once until it is given back,
// by its bit in `used`; whoever has a block alone accesses it.
unsafe impl Sync for Room {}

static ROOM: Room = Room(UnsafeCell::new([0; BYTES]));

/// Blocks of one size. Taking and giving back is one atomic operation, so that a child that is forked meanwhile finds
/// no lock held.
struct Class {
    /// Bytes of a block.
    size: usize,
    /// Where the first block is.
    start: usize,
    /// How many there are, at most 64.
    count: usize,
    /// Bit i: block i is in use.
    used: AtomicU64,
}

impl Class {
    const fn new(size: usize, start: usize, count: usize) -> Class {
        assert!(size.is_multiple_of(ALIGN) && size < UNRESERVED);
        assert!(count <= 64 && start + size * count <= BYTES);
        Class { size, start, count, used: AtomicU64::new(0) }
    }

    /// The offset of a block that was free.
    fn take(&self) -> Option<usize> {
        let free = |used: u64| (!used).trailing_zeros() as usize;
        let one = |used: u64| (free(used) < self.count).then(|| used | 1 << free(used));
        let before = self.used.fetch_update(Ordering::Acquire, Ordering::Relaxed, one).ok()?;
        Some(self.start + free(before) * self.size)
    }

    /// Frees the block at an offset, if it is one of these.
    fn give_back(&self, offset: usize) {
        let index = offset.wrapping_sub(self.start) / self.size;
        if index < self.count {
            self.used.fetch_and(!(1 << index), Ordering::Release);
        }
    }
}

static CLASSES: [Class; 4] = [
    Class::new(128, 0, 64),
    Class::new(256, 8 << 10, 64),
    Class::new(2 << 10, 24 << 10, 12),
    Class::new(8 << 10, 48 << 10, 2),
];

fn take(layout: Layout) -> *mut u8 {
    let fits = |class: &&Class| layout.size() <= class.size;
    if layout.align() > ALIGN {
        return ptr::null_mut();
    }
    match CLASSES.iter().filter(fits).find_map(Class::take) {
        Some(offset) => ROOM.0.get().cast::<u8>().wrapping_add(offset),
        None => ptr::null_mut(),
    }
}

fn is_taken(block: *mut u8) -> bool {
    let start = ROOM.0.get().cast::<u8>();
    (start..start.wrapping_add(BYTES)).contains(&block)
}

fn give_back(block: *mut u8) {
    let offset = block as usize - ROOM.0.get() as usize;
    CLASSES.iter().for_each(|class| class.give_back(offset));
}

/// The allocator.
struct WithReserve;

#[global_allocator]
static ALLOCATOR: WithReserve = WithReserve;

// SAFETY: a block is either the system's, which gets back what it gave away, since `is_taken` tells the two apart, or a
// part of the room that nobody else has (`Class::take`), aligned (`Class::new`) and as large as its layout asks
// (`take`). No method unwinds.
unsafe impl GlobalAlloc for WithReserve {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the size of the layout is not 0 (# Safety of `GlobalAlloc::alloc`), which is all that the system's
        // asks.
        let block = unsafe { System.alloc(layout) };
        if block.is_null() { take(layout) } else { block }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the size of the layout is not 0 (# Safety of `GlobalAlloc::alloc_zeroed`), which is all that the
        // system's asks.
        let block = unsafe { System.alloc_zeroed(layout) };
        if !block.is_null() {
            return block;
        }
        let block = take(layout);
        if !block.is_null() {
            // SAFETY: `take` above has given the block to this caller, of a class that the layout's size fits.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if is_taken(block) {
            return give_back(block);
        }
        // SAFETY: the block is not of the reserve (`is_taken`), so the system gave it away, with this layout (# Safety
        // of `GlobalAlloc::dealloc`).
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !is_taken(block) {
            // SAFETY: the block is not of the reserve (`is_taken`), so the system gave it away, with this layout, and
            // `size` is not 0 (# Safety of `GlobalAlloc::realloc`).
            let moved = unsafe { System.realloc(block, layout, size) };
            if !moved.is_null() {
                return moved;
            }
        }
        let Ok(wanted) = Layout::from_size_align(size, layout.align()) else {
            return ptr::null_mut();
        };
        // SAFETY: `size` is not 0, and the old block has this layout (# Safety of `GlobalAlloc::realloc`). `alloc` has
        // given the new block away while the old one was in use, so they are apart, and both have the bytes that are
        // copied: the lesser of their sizes. The old one is then not used any more.
        unsafe {
            let moved = self.alloc(wanted);
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(block, layout.size().min(size));
                self.dealloc(block, layout);
            }
            moved
        }
    }
}
