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

/// The bytes of the reserve: some jobs for each of 64 threads, or what a small pool is made of.
const BYTES: usize = 64 * 1024;

/// Every block begins at a multiple of this, which no layout of the standard library's or rayon's exceeds but those
/// aligned to cache lines.
const ALIGN: usize = 128;

#[repr(align(128))]
struct Room(UnsafeCell<[u8; BYTES]>);

// SAFETY: `take` gives away each part of it once until all are given back; whoever has a part alone accesses it.
unsafe impl Sync for Room {}

static ROOM: Room = Room(UnsafeCell::new([0; BYTES]));

/// Bytes given away (low half) and blocks among them that are in use (high half). When the last block is given back,
/// all of the room is free again.
static TAKEN: AtomicU64 = AtomicU64::new(0);

const BLOCK: u64 = 1 << 32;

fn take(layout: Layout) -> *mut u8 {
    let size = layout.size().max(1).next_multiple_of(ALIGN);
    if layout.align() > ALIGN || size >= UNRESERVED {
        return ptr::null_mut();
    }
    let given = TAKEN.fetch_update(Ordering::Acquire, Ordering::Relaxed, |taken| {
        let end = (taken % BLOCK) as usize + size;
        (end <= BYTES).then(|| taken + BLOCK + size as u64)
    });
    match given {
        Ok(taken) => ROOM.0.get().cast::<u8>().wrapping_add((taken % BLOCK) as usize),
        Err(_) => ptr::null_mut(),
    }
}

fn is_taken(block: *mut u8) -> bool {
    let start = ROOM.0.get().cast::<u8>();
    (start..start.wrapping_add(BYTES)).contains(&block)
}

fn give_back() {
    let back = |taken: u64| Some(if taken / BLOCK == 1 { 0 } else { taken - BLOCK });
    let _ = TAKEN.fetch_update(Ordering::Release, Ordering::Relaxed, back);
}

/// The allocator.
struct WithReserve;

#[global_allocator]
static ALLOCATOR: WithReserve = WithReserve;

// SAFETY: a block is either the system's, which gets back what it gave away, or a part of the room that nobody else
// has, aligned and as large as its layout asks. No method unwinds.
unsafe impl GlobalAlloc for WithReserve {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc`, which is also that of the system's.
        let block = unsafe { System.alloc(layout) };
        if block.is_null() { take(layout) } else { block }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc_zeroed`, which is also that of the system's.
        let block = unsafe { System.alloc_zeroed(layout) };
        if !block.is_null() {
            return block;
        }
        let block = take(layout);
        if !block.is_null() {
            // SAFETY: the block is this caller's, and has the size of the layout.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if is_taken(block) {
            return give_back();
        }
        // SAFETY: the block is not of the reserve, so the system gave it away with this layout.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !is_taken(block) {
            // SAFETY: the block is not of the reserve, so the system gave it away with this layout.
            let moved = unsafe { System.realloc(block, layout, size) };
            if !moved.is_null() {
                return moved;
            }
        }
        let Ok(wanted) = Layout::from_size_align(size, layout.align()) else {
            return ptr::null_mut();
        };
        // SAFETY: the layout is one of `size` bytes, which are not 0 (the contract of `realloc`). The new block is
        // apart from the old one, and both have the bytes that are copied. The old one is then not used any more.
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
