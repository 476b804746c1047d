//! Every tuned number and every choice of algorithm, each with the measurement behind it.
//!
//! The functions take plain numbers, so that every layer may ask. Choices that decide in which order sums are
//! added depend on the problem alone, so that the bits of a result do not depend on the number of threads,
//! the instruction set or other rows.

/// Rows of a group: the row arithmetic runs over a group at a time. A register of AVX-512 has as many f64
/// lanes, and narrower sets take two or four.
pub const ROWS: usize = 8;

/// Classes of a chunk: their exponentials are summed in one go and share a shift. 2048 f32 logits, the
/// 8 KiB that fit half of a first-level cache of 32 KiB with what is written beside them.
pub const CHUNK: usize = 2048;

/// The most segments that a row is cut into, and the most chunks of a segment that are told apart.
pub const SEGMENTS: usize = 64;

/// Classes up to which a fused call in place stores the exponentials of its first sweep for the second.
/// Beyond it a segment has more chunks than [`SEGMENTS`] flags.
pub const STORED_EXPS_CLASSES: usize = SEGMENTS * SEGMENTS * CHUNK;

/// Classes from which a row's initial shift is taken.
pub const HEAD: usize = 256;

/// Chunks that one call of a kernel sums up at most: a call costs as much as some dozens of classes.
pub const CHUNKS_A_CALL: usize = 32;

/// Blocks that are summed in f32 lanes before the lanes are widened to f64: no more than four additions
/// a lane. Equal terms round alike, and with eight blocks their error showed
/// (`fuzzed::equal_terms_beside_one`).
pub const BLOCKS_A_FLUSH: usize = 4;

/// A chunk's sum from here on is redone with a shift of the chunk's own: stored exponentials stay far
/// from overflow.
pub const LARGEST_SUM: f64 = (1u64 << 60) as f64;

/// The same where exponentials are multiplied with a weight before they get their factor: the products must not
/// overflow.
pub const LARGEST_PRODUCT_SUM: f64 = (1u64 << 30) as f64;

/// If the initial shift is not a logit of the row, a sum below this is redone too: the exponentials that
/// were flushed to 0 are then less than 2^-125 of the row.
pub const SMALLEST_SUM: f64 = 0.5;

/// Bytes of a cache line.
pub const LINE: usize = 64;

/// Bytes of a memory page, and the pages that a sweep prefetches together: a block from each in turn,
/// since memory delivers several pages at once faster than one after the other (docs/performance.md).
pub const PAGE: usize = 4096;
/// See [`PAGE`].
pub const PREFETCH_SPAN: usize = 4 * PAGE;

/// Classes ahead that the gradient of a strip prefetches where its memory [is far](is_far): a class apart, where no
/// processor looks.
pub const CLASSES_AHEAD: usize = 2;

/// Classes up to which a batch of rows stays in the first level of cache between its sweeps.
pub const BATCHED_CLASSES: usize = 1280;

/// Bytes of logits of a batch that stays in the second level beside another: 0.92 of the time of single
/// rows at 8192 classes, 0.96 at 16000, no difference from 32000 on.
const INTERLEAVED_BYTES: usize = 512 * 1024;

/// Bytes of a row from which its gradient is interleaved with the next row's reduction: the row leaves
/// the first level of cache between the two sweeps (docs/performance.md).
const INTERLEAVED_ROW_BYTES: usize = 32 * 1024;

/// Bytes of a row up to which the gradient's sweep prefetches the row after the next: it fits the second
/// level of cache beside the gradient.
const FETCHED_ROW_BYTES: usize = 512 * 1024;

/// Distributions of a tile: one cache line of f32 per class and register of AVX-512, four registers
/// abreast.
pub const TILE: usize = 64;

/// Distributions whose largest logits are looked for together where they are not looked for along with the sums, if
/// there is room: half a cache line of f32 where distributions lie side by side.
pub const RANKED: usize = 8;
/// Largest logits that there is room for then, on the stack: of two distributions at least.
pub const RANKED_ENTRIES: usize = 128;

/// Classes whose weights label smoothing has as f64 at a time: 2 KiB on the stack.
pub const WEIGHED_CLASSES: usize = 256;

/// Class weights from here on do not go along with factors in lanes of f32: their products with factors that are
/// rounded to 0 would be seen.
pub const LARGEST_WEIGHT: f64 = (1 << 20) as f64;

/// Classes of a tile's chunk: 64 distributions of them are 8 KiB of f32.
pub const TILE_CLASSES: usize = 32;

/// Distributions of a strip at most, half as many in lanes of f64: it reads this many neighbours of one class, then of
/// the next.
pub const STRIP: usize = 256;

/// Bytes of a strip's exponentials, or of logits that are not where a strip needs them; of those of short rows; and of
/// a tile's logits, slopes and masses. They are on the stack, of which a call takes 48 KiB at most.
pub const STRIP_BYTES: usize = 16 * 1024;

/// Bytes that a task takes from the heap for the exponentials of a strip, where a stack would hold too few
/// lanes; a strip of fewer lanes reads too little of each class at a time.
pub const HEAP_STRIP_BYTES: usize = 96 * 1024;

/// Rows of a small call at most: the lanes of a strip of f64, or of a smoothed one. The general way takes 400 ns more: 64
/// rows of 10 take 0.6 of its time, 128 of them 0.8.
pub const SMALL_ROWS: usize = STRIP / 2;

/// Logits of a small call of short rows at most, where nothing has to be kept of them.
const SMALL_ELEMENTS: usize = 64 * 1024;

/// Narrow rows of a small call up to which lanes run along the classes of one after the other.
pub const SINGLE_ROWS: usize = 4;

/// Registers of a tile that are scanned together for their largest logits: a scan is a chain of dependent
/// instructions, and everything up to the first exponential waits for it. Four are as many as a tile of f32
/// has with AVX-512.
pub const REGISTERS_ABREAST: usize = 4;

/// Bytes of a row, in the lanes' type, up to which lanes run along rows though classes are contiguous:
/// the work that a row needs once is then done for many rows at once. 128 classes, or 64 of f64; about
/// there both ways cost the same (docs/performance.md).
const NARROW_BYTES: usize = 512;

/// Classes from which contiguous rows that may be ordinary are summed one by one, not in strips: at 64 both take as
/// long, at 80 a gradient takes 0.7 of the time (f32, AVX-512).
pub const SHORT_FROM: usize = 80;

/// Classes that the shift of such a row is chosen from: a register of f32 with AVX-512.
pub const SHORT_HEAD: usize = 16;

/// Classes up to which they are, in lanes of so many bytes: the exponentials of one row fit the buffer.
const fn short_classes(lane_size: usize) -> usize {
    STRIP_BYTES / lane_size - 64
}

/// Gradients of at least this many bytes are written around the caches (docs/performance.md).
const STREAMED_BYTES: usize = 16 << 20;

/// Tasks that a range of rows is cut into at most: enough that 64 threads are evenly loaded.
pub const TASKS: usize = 256;

/// Elements below which a task is not worth its while: rows go through their stages in batches.
const TASK_ELEMENTS: usize = 8 * 1024;

/// Portions of the tasks that each thread takes, about.
pub const PORTIONS: usize = 16;

/// Elements that are worth a thread: below twice this, everything stays on the calling thread. Waking a
/// worker costs 2 µs at best and near 20 on average, so that two threads break even with one at 128,000
/// elements (docs/performance.md).
pub const THREAD_ELEMENTS: usize = 64 * 1024;

/// Rows a thread below which threads share each row, if it has more than one segment: fewer rows do not keep
/// them evenly busy.
const SHARED_ROWS: usize = 4;

/// Steps of a product that are added up in one chain of registers, before the sum goes to memory: with more, the
/// panel that a chain reads leaves the first level of cache on AVX2, and the roundings of a chain grow.
pub const PRODUCT_DEPTH: usize = 256;

/// Classes of a block of logits that a linear layer forms at a time.
pub const VOCABULARY_BLOCK: usize = 256;

/// Lanes from one row of such a block to the next. Rows whose distance is a power of 2 share a few sets of the cache:
/// a product takes 1.02 times as long.
pub const VOCABULARY_PITCH: usize = VOCABULARY_BLOCK + 16;

/// Rows of a row block of a linear layer at most. Each block packs the whole weight, which more rows share.
pub const LINEAR_ROWS: usize = 512;

/// Rows at most of a chunk whose logits a workspace keeps: the depth of one chain of the product that makes the
/// gradient of the weight.
pub const CHUNK_ROWS: usize = PRODUCT_DEPTH;

/// Rows at least of a chunk, unless there are no more. Each chunk packs the weight twice; with fewer rows the product
/// that it spares would not pay for that.
pub const LEAST_CHUNK_ROWS: usize = 64;

/// Rows of a row block are a multiple of it: of the rows that a product keeps in registers, and of a group.
pub const LINEAR_ROWS_UNIT: usize = 24;

/// Whether a processor that has AVX512_BF16 multiplies bf16 by its instruction for pairs. AMD's do: a core of Zen 5 did
/// 490e9 operations a second by it, and 246e9 by fused multiply-add. On Intel's Sapphire Rapids the instruction has
/// 0.43 of the rate of fused multiply-add (docs/experiments.md). `--cfg xent_pairs` decides for pairs, for tests.
#[cfg(x86_sets)]
pub fn multiplies_pairs() -> bool {
    use std::sync::atomic::{AtomicU8, Ordering};
    const UNKNOWN: u8 = 2;
    // Asked once, as a virtual machine answers slowly; without a lock, so that a child of any fork may ask.
    static IS_AMD: AtomicU8 = AtomicU8::new(UNKNOWN);
    let mut is_amd = IS_AMD.load(Ordering::Relaxed);
    if is_amd == UNKNOWN {
        #[allow(
            unused_unsafe,
            reason = "unsafe in Rust 1.89, which is supported, and safe in later versions"
        )]
        // SAFETY: every x86-64 has the instruction and its leaf 0.
        let vendor = unsafe { std::arch::x86_64::__cpuid(0) };
        let name = [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes);
        is_amd = u8::from([vendor.ebx, vendor.edx, vendor.ecx] == name);
        IS_AMD.store(is_amd, Ordering::Relaxed);
    }
    cfg!(xent_pairs) || is_amd == 1
}

/// Fused multiply-adds of a product that take as long as an element of logits.
pub const MACS_OF_AN_ELEMENT: usize = 16;

/// Whether the threads share each row. They do only where every row is a task, so that the sums over rows
/// are the same either way.
#[inline(always)]
pub fn shares_rows(rows: usize, threads: usize) -> bool {
    threads > 1 && rows < SHARED_ROWS * threads && rows <= TASKS
}

/// Numbers that scalar code converts to f64 together.
pub const CONVERTED: usize = 256;

/// What a scan of one target costs, in elements of logits.
pub const TARGET_SCAN_ELEMENTS: usize = 4;

/// What the results of one merged state cost, in elements of logits: a dozen operations and as many reads and
/// writes, as a target in the scan, and the sums over rows.
pub const MERGED_ROW_ELEMENTS: usize = 32;

/// Whether lanes run along rows although classes are contiguous.
#[inline(always)]
pub fn is_narrow(classes: usize, lane_size: usize, has_ordinary_rows: bool) -> bool {
    if has_ordinary_rows { classes < SHORT_FROM } else { classes <= NARROW_BYTES / lane_size }
}

/// Lanes from the exponentials of a short row to those of the next: whole blocks, and room for a register that begins
/// at the last class.
#[inline(always)]
pub const fn exps_pitch(classes: usize) -> usize {
    (classes + SHORT_HEAD - 1).next_multiple_of(64)
}

/// Whether contiguous rows that may be ordinary are short.
#[inline(always)]
pub fn is_short(classes: usize, lane_size: usize) -> bool {
    (SHORT_FROM..=short_classes(lane_size)).contains(&classes)
}

/// Whether a call over so many packed rows, in lanes of so many bytes, is a small one. There has to be room for what is
/// kept: the logits of narrow rows, which are one task then, and the exponentials of short ones for a gradient.
#[inline(always)]
pub fn is_small(rows: usize, classes: usize, lane_size: usize, has_gradient: bool) -> bool {
    if !(1..=SMALL_ROWS).contains(&rows) {
        return false;
    }
    let most = STRIP_BYTES / lane_size;
    if !is_short(classes, lane_size) {
        (2..SHORT_FROM).contains(&classes) && rows.next_multiple_of(16) * classes <= most
    } else if has_gradient {
        rows * exps_pitch(classes) <= most
    } else {
        rows * classes <= SMALL_ELEMENTS
    }
}

/// Whether the rows of a loss over class indices may be ordinary: a class has a number in lanes of f32. A row of one
/// class has no others to sum up.
#[inline(always)]
pub fn has_ordinary_rows(classes: usize) -> bool {
    (2..=1 << 24).contains(&classes)
}

/// Whether a task with a gradient, of so many elements and bytes of exponentials a lane, takes memory for them
/// where distributions lie side by side.
#[inline(always)]
pub fn keeps_on_heap(lane_bytes: usize, elements: usize) -> bool {
    let lanes = |bytes: usize| bytes / lane_bytes;
    lanes(STRIP_BYTES) < TILE && lanes(HEAP_STRIP_BYTES) >= TILE && elements >= THREAD_ELEMENTS
}

/// Whether the second sweep over a row goes along with the first over the next, if the call allows it.
#[inline(always)]
pub fn interleaves(row_bytes: usize) -> bool {
    row_bytes >= INTERLEAVED_ROW_BYTES
}

/// Whether the second sweep over a row prefetches the row after the next.
#[inline(always)]
pub fn fetches_ahead(row_bytes: usize) -> bool {
    row_bytes <= FETCHED_ROW_BYTES
}

/// Rows of a batch, of `most` at the most, which go through each stage together. What one row waits for
/// (reductions, logarithms) is hidden behind the work of the others, as long as all stay in the cache
/// between their two sweeps. With a single sweep, no cache is asked for.
#[inline(always)]
pub fn batch_len(classes: usize, row_bytes: usize, sweeps: Sweeps, most: usize) -> usize {
    match sweeps {
        Sweeps::One => most,
        _ if classes <= BATCHED_CLASSES => most,
        Sweeps::Interleaved if segments(classes) == 1 => {
            (INTERLEAVED_BYTES / row_bytes).clamp(1, most)
        }
        Sweeps::Interleaved | Sweeps::Two => 1,
    }
}

/// The sweeps over the logits of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sweeps {
    /// There is no gradient.
    One,
    /// A row's gradient follows its reduction.
    Two,
    /// A row's gradient goes along with the next row's reduction.
    Interleaved,
}

/// Rows of a batch whose initial shifts are chosen together: those that the sums before have prefetched.
#[inline(always)]
pub fn prefetched_rows(row_bytes: usize, most: usize) -> usize {
    (PREFETCH_SPAN / row_bytes.max(1)).clamp(1, most)
}

/// Whether the stores of a gradient of `bytes` bypass the caches. They do only where nothing is read from
/// the same memory and neighbours are stored together: classes, or distributions.
pub fn streams(in_place: bool, accumulate: bool, has_neighbours: bool, bytes: usize) -> bool {
    !in_place && !accumulate && has_neighbours && bytes >= STREAMED_BYTES
}

/// Whether the gradient of a strip prefetches: its memory is not in the second level of cache, to go by the `bytes` of the
/// whole gradient, and the sums have not just read it into the first. It takes 0.83 to 0.96 of the time with prefetches, and
/// 1.02 to 1.09 in cache.
pub fn is_far(in_place: bool, bytes: usize, strip_bytes: usize) -> bool {
    const SECOND_LEVEL: usize = 1 << 20;
    const FIRST_LEVEL: usize = 32 << 10;
    bytes > SECOND_LEVEL && (!in_place || strip_bytes > FIRST_LEVEL)
}

/// Short rows that are summed before their gradients are streamed, of so many bytes each. A processor takes some lines of
/// streamed stores, and sums up the next rows while it writes them; more of them it waits for. 0.89 to 0.99 of the time of
/// 100 to 1900 classes of f32; rows of 16 KB, one at a time, took 1.02 to 1.15.
pub fn streamed_rows(row_bytes: usize) -> usize {
    let together = 2 * PAGE;
    if row_bytes > together { usize::MAX } else { together / row_bytes }
}

/// Rows, or tiles, of a task: a function of the problem alone, as the order of all sums is. `elements` is
/// how many a row, or a tile, has; rows come in whole groups where there are enough.
pub fn task_len(rows: usize, elements: usize) -> usize {
    let len = rows.div_ceil(TASKS).max(TASK_ELEMENTS / elements.max(1)).max(1);
    if len < ROWS { len } else { len.next_multiple_of(ROWS) }
}

/// Tiles of a task that takes them as strips: whole strips where there are 64 tiles or more, as a sweep over so many
/// neighbours of one class waits for fewer pages. 1.05 to 1.45 of the speed of [1, 1000, 4096], on one thread and on two;
/// of which no more than 16 would take part there.
pub fn strip_task_len(tiles: usize, classes: usize) -> usize {
    const STRIP_TILES: usize = STRIP / TILE;
    let len = task_len(tiles, TILE.saturating_mul(classes));
    if tiles >= 16 * STRIP_TILES { len.next_multiple_of(STRIP_TILES) } else { len }
}

/// Classes of a segment, the unit in which threads share one row: a function of C alone, so that the
/// order of all sums is one too. 64k classes, more past 4M of them.
#[inline(always)]
pub fn segment_len(classes: usize) -> usize {
    const LEN: usize = 32 * CHUNK;
    if classes <= SEGMENTS * LEN { LEN } else { classes.div_ceil(SEGMENTS).next_multiple_of(CHUNK) }
}

/// Segments of a row, at most [`SEGMENTS`].
#[inline(always)]
pub fn segments(classes: usize) -> usize {
    classes.div_ceil(segment_len(classes))
}

/// Narrow rows that go one by one fit the buffer of a small call, and the longest short row that of short rows.
const _: () = assert!(
    SHORT_FROM.next_multiple_of(16) * SINGLE_ROWS * 8 <= STRIP_BYTES
        && exps_pitch(short_classes(4)) * 4 <= STRIP_BYTES
        && exps_pitch(short_classes(8)) * 8 <= STRIP_BYTES
        && SHORT_HEAD <= SHORT_FROM
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrow_rows_of_small_calls_are_one_task() {
        for lane_size in [4, 8] {
            for classes in 2..SHORT_FROM {
                let is_small = |rows: &usize| is_small(*rows, classes, lane_size, true);
                let most = (1..=SMALL_ROWS + 1).take_while(is_small).last().unwrap();
                assert!((SINGLE_ROWS..=SMALL_ROWS).contains(&most));
                assert!(most.div_ceil(TILE) <= strip_task_len(most.div_ceil(TILE), classes));
            }
        }
    }

    #[test]
    fn tasks_of_strips_are_whole_strips() {
        for (tiles, classes, expected) in [
            (63, 1000, 1),
            (64, 1000, 4),
            (1024, 50, 4),
            (1280, 50, 8),
            (64, 21, 8),
            (32768, 21, 128),
        ] {
            assert_eq!(strip_task_len(tiles, classes), expected, "{tiles} tiles of {classes}");
        }
    }

    /// The order of sums over rows, and so their bits, follows from these lengths.
    #[test]
    fn tasks_depend_on_rows_and_their_elements() {
        for (rows, elements, expected) in [
            (1, 1 << 40, 1),
            (TASKS, TASK_ELEMENTS, 1),
            // One task a row would be too many.
            (TASKS + 1, TASK_ELEMENTS, 2),
            (2 * TASKS, 100_000, 2),
            (2 * TASKS + 1, 100_000, 3),
            (7 * TASKS, 100_000, 7),
            // Enough elements, in whole groups where there are enough rows.
            (10, 1171, 6),
            (10, 1170, 7),
            (10, 1024, 8),
            (10, 900, 16),
            (100_000, 10, 824),
            (7 * TASKS + 1, 100_000, 8),
            (8 * TASKS + 1, 100_000, 16),
            (1_000_000, 10, 3912),
            (3, 0, TASK_ELEMENTS),
        ] {
            let len = task_len(rows, elements);
            assert_eq!(len, expected, "{rows} rows of {elements}");
            assert!(rows <= TASKS * len, "{rows} rows of {elements}");
        }
    }
}
