//! The memory of a linear loss: a fixed amount for each thread, all of it taken before anything is written.

use crate::drivers::batch::Reduction;
use crate::drivers::masses::Divergence;
use crate::error::Error;
use crate::kernels::product::DEPTH;
use crate::kernels::ranking::{Entry, Ranking};
use crate::kernels::row_math::{ROWS, RowGroup, RowGroupExtras};
use crate::kernels::row_state::{ArgMax, RowState};
use crate::math::exp2::Shift;
use crate::strategy::{self, VOCABULARY_BLOCK, VOCABULARY_PITCH};
use crate::worker::UNRESERVED;
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

/// Bytes that [`reserve`] asks for, for so many elements.
fn reserved_bytes<T>(len: usize) -> usize {
    let bytes = len.saturating_mul(size_of::<T>());
    // Whole elements.
    let whole = bytes.max(UNRESERVED).checked_next_multiple_of(size_of::<T>());
    if len == 0 { 0 } else { whole.unwrap_or(usize::MAX) }
}

/// An empty vector with room for `len` elements.
pub fn reserve<T>(len: usize) -> Result<Vec<T>, Error> {
    let mut vec = Vec::new();
    let len = reserved_bytes::<T>(len) / size_of::<T>();
    match vec.try_reserve_exact(len) {
        Ok(()) => Ok(vec),
        Err(_) => Err(Error::Memory { bytes: len.saturating_mul(size_of::<T>()) }),
    }
}

/// Bytes of a cache line that may hold nothing yet.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(
    #[allow(
        dead_code,
        reason = "gives a line its size; `Memory::start` is the way to what is in it"
    )]
    MaybeUninit<[u8; 64]>,
);

/// Memory that holds nothing yet, aligned to a cache line.
pub struct Memory(Vec<Line>);

impl Memory {
    /// So many bytes, rounded up to lines.
    pub fn new(bytes: usize) -> Result<Memory, Error> {
        Ok(Memory(reserve(bytes.div_ceil(size_of::<Line>()))?))
    }

    /// The bytes that so many take.
    fn bytes(bytes: usize) -> usize {
        reserved_bytes::<Line>(bytes.div_ceil(size_of::<Line>()))
    }

    /// The first byte.
    #[inline(always)]
    pub fn start(&self) -> *mut u8 {
        self.0.as_ptr().cast::<u8>().cast_mut()
    }
}

/// Bytes of a vocabulary block of zeros.
const ZERO_BYTES: usize = VOCABULARY_BLOCK * size_of::<f64>();

/// How a call divides its rows, and the bytes that it takes.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Rows of a row block.
    pub block_rows: usize,
    /// Rows that the gradient of the weight takes at a time, whatever the number of threads.
    pub weight_rows: usize,
    /// Rows of a chunk whose logits are kept; 0 if none are.
    pub chunk_rows: usize,
    /// Threads that work.
    pub threads: usize,
    /// Bytes of the sums of a gradient that has another type than the lanes.
    sums: usize,
}

/// What one thread works in.
pub struct Worker {
    /// A block of logits, or of their gradient.
    pub tile: Memory,
    /// The packed operand of a product.
    pub pack: Memory,
    /// The first operand of a product, if it has to be prepared.
    pub left: Memory,
    /// The sums of a gradient that has another type than the lanes.
    pub sums: Memory,
    /// A vocabulary block of zeros, of any type.
    pub zeros: Memory,
    /// The rows of a row block on their way through the row arithmetic.
    pub groups: Vec<RowGroup>,
    /// See `groups`.
    pub extras: Vec<RowGroupExtras>,
    /// What is known of each row.
    pub states: Vec<RowState>,
    /// What the sweeps over each row are to do.
    pub reductions: Vec<Option<Reduction>>,
    /// Where the exponents of each row are counted from, if exponentials are multiplied.
    pub shifts: Vec<Shift>,
    /// The largest logit of each row, if that is excluded.
    pub largest: Vec<ArgMax>,
    /// The divergence of each row from its targets, if that is wanted.
    pub divergences: Vec<Divergence>,
    /// The order of each row's logits, if it is wanted.
    pub rankings: Vec<Ranking>,
    /// The largest logits of each row, as many as are listed.
    pub entries: Vec<Entry>,
    /// The rows of a product's first operand.
    pub left_rows: Vec<*const u8>,
    /// The rows of its second operand.
    pub packed_rows: Vec<*const u8>,
    /// The rows of the product.
    pub out: Vec<*mut u8>,
    /// The same from a later column on.
    pub shifted: Vec<*mut u8>,
}

// SAFETY: the addresses are of this worker's memory and of operands; every access through them is unsafe, and
// asks its caller that no other thread accesses what is written.
unsafe impl Send for Worker {}

impl Worker {
    fn new(needs: &Needs, sizes: &Sizes) -> Result<Worker, Error> {
        let rows = needs.block_rows;
        let tile_rows = rows.max(needs.weight_rows);
        let most = tile_rows.max(VOCABULARY_BLOCK);
        let groups = rows.div_ceil(ROWS);
        let zeros = Memory::new(ZERO_BYTES)?;
        // SAFETY: `Memory::new` above took so many bytes, and nobody else has their address yet.
        unsafe { zeros.start().write_bytes(0, ZERO_BYTES) };
        Ok(Worker {
            zeros,
            tile: Memory::new(tile_rows * VOCABULARY_PITCH * sizes.lane)?,
            pack: Memory::new(DEPTH * VOCABULARY_BLOCK * sizes.lane)?,
            left: Memory::new(sizes.left_bytes(tile_rows))?,
            sums: Memory::new(needs.sums)?,
            groups: reserve(groups)?,
            extras: reserve(groups)?,
            states: reserve(rows)?,
            reductions: reserve(rows)?,
            shifts: reserve(rows)?,
            largest: reserve(rows)?,
            divergences: reserve(rows)?,
            rankings: reserve(if sizes.top_count.is_some() { rows } else { 0 })?,
            entries: reserve(rows * sizes.top_count.unwrap_or(0))?,
            left_rows: reserve(most)?,
            packed_rows: reserve(most)?,
            out: reserve(most)?,
            shifted: reserve(most)?,
        })
    }
}

/// One worker for each thread.
pub struct Workers(Mutex<Vec<Worker>>);

impl Workers {
    /// Takes the memory of all threads. A function of its own: what works in the memory is not on top of its frame.
    #[inline(never)]
    pub fn new(needs: &Needs, sizes: &Sizes) -> Result<Workers, Error> {
        let mut workers = reserve(needs.threads)?;
        for _ in 0..needs.threads {
            workers.push(Worker::new(needs, sizes)?);
        }
        Ok(Workers(Mutex::new(workers)))
    }

    /// Lends a worker to the calling thread.
    pub fn with(&self, f: impl FnOnce(&mut Worker)) {
        let mut worker = self.take();
        f(&mut worker);
        self.give_back(worker);
    }

    /// A function of its own, like [`Workers::new`].
    #[inline(never)]
    fn take(&self) -> Worker {
        let mut workers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        workers.pop().expect("there is a worker for each thread")
    }

    /// Likewise.
    #[inline(never)]
    fn give_back(&self, worker: Worker) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
    }
}

/// The sizes that decide about memory.
pub struct Sizes {
    /// Rows that take part in products.
    pub rows: usize,
    /// C
    pub classes: usize,
    /// D
    pub features: usize,
    /// Bytes of a lane.
    pub lane: usize,
    /// Hidden states have another type than the lanes.
    pub widens: bool,
    /// Bytes of the record of a row.
    pub record: usize,
    /// The gradient of the hidden states has another type than the lanes, and sums apart from it.
    pub has_hidden_sums: bool,
    /// The same of the weight.
    pub has_weight_sums: bool,
    /// The gradient of the weight is wanted.
    pub has_weight: bool,
    /// That of the bias is.
    pub has_bias: bool,
    /// Logits are made more than once, unless they are kept.
    pub makes_logits_again: bool,
    /// The classes listed for each row, if the order of its logits is wanted.
    pub top_count: Option<usize>,
    /// Bytes that the call may allocate; 0 for as few as run near full speed.
    pub workspace: usize,
}

impl Sizes {
    /// Bytes of the first operand of a product, where it does not lie as the product takes it: DEPTH lanes for each of
    /// so many rows, or of a chunk's, or DEPTH steps of a vocabulary block.
    fn left_bytes(&self, rows: usize) -> usize {
        let lanes = rows.max(strategy::CHUNK_ROWS).max(VOCABULARY_PITCH) * DEPTH;
        if self.widens { lanes * self.lane } else { 0 }
    }

    /// Bytes of the sums of gradients, for so many rows of a row block.
    fn sums_bytes(&self, rows: usize) -> usize {
        let hidden = if self.has_hidden_sums { rows } else { 0 };
        let weight = if self.has_weight_sums { VOCABULARY_BLOCK } else { 0 };
        hidden.max(weight).saturating_mul(self.features * self.lane)
    }

    /// Bytes that a thread works in.
    fn worker_bytes(&self, needs: &Needs) -> usize {
        let (rows, tile_rows) = (needs.block_rows, needs.block_rows.max(needs.weight_rows));
        let groups = rows.div_ceil(ROWS);
        let blocks = Memory::bytes(tile_rows * VOCABULARY_PITCH * self.lane)
            + Memory::bytes(DEPTH * VOCABULARY_BLOCK * self.lane)
            + Memory::bytes(self.left_bytes(tile_rows))
            + Memory::bytes(ZERO_BYTES);
        let states = reserved_bytes::<RowGroup>(groups)
            + reserved_bytes::<RowGroupExtras>(groups)
            + reserved_bytes::<RowState>(rows)
            + reserved_bytes::<Option<Reduction>>(rows)
            + reserved_bytes::<Shift>(rows)
            + reserved_bytes::<ArgMax>(rows)
            + reserved_bytes::<Divergence>(rows)
            + self.top_count.map_or(0, |count| {
                reserved_bytes::<Ranking>(rows) + reserved_bytes::<Entry>(rows * count)
            });
        let addresses = 4 * reserved_bytes::<usize>(tile_rows.max(VOCABULARY_BLOCK));
        Memory::bytes(needs.sums).saturating_add(blocks + states + addresses)
    }

    /// Decides how rows are divided among threads, within the workspace.
    pub fn needs(&self, threads: usize) -> Result<Needs, Error> {
        // Twice the bytes, or buffers of sums and hidden states beside the tile, for all but f32.
        let is_f32 = self.lane == size_of::<f32>() && !self.widens;
        let most = if is_f32 { strategy::LINEAR_ROWS } else { strategy::LINEAR_ROWS / 2 };
        // As many blocks as keep all threads busy until the end.
        let blocks = self.rows.div_ceil(most).next_multiple_of(threads).max(1);
        let each = self.rows.max(1).div_ceil(blocks);
        let block_rows = each.next_multiple_of(strategy::LINEAR_ROWS_UNIT).min(most);
        let weight_rows = if self.has_weight || self.has_bias { most } else { 0 };
        let sums = self.sums_bytes(block_rows);
        let mut needs = Needs { block_rows, weight_rows, chunk_rows: 0, threads, sums };
        let workspace = self.workspace;
        if workspace > 0 {
            let records = self.rows.saturating_add(1).saturating_mul(self.record);
            let fixed = reserved_bytes::<usize>(self.rows)
                .saturating_add(records.max(UNRESERVED + self.record))
                .saturating_add(reserved_bytes::<Worker>(threads));
            let each = self.worker_bytes(&needs);
            let affordable = workspace.saturating_sub(fixed) / each;
            if affordable == 0 {
                return Err(Error::Param(format!(
                    "workspace = {workspace} is less than the {} bytes that this call needs",
                    fixed.saturating_add(each)
                )));
            }
            needs.threads = threads.min(affordable);
            if self.makes_logits_again {
                needs.chunk_rows = self.chunk_rows(workspace - fixed - needs.threads * each);
            }
        }
        Ok(needs)
    }

    /// Bytes of a chunk of so many rows: of its logits, and of the sums of the gradients of hidden states, weight and
    /// bias.
    pub fn chunk_bytes(&self, rows: usize) -> [usize; 4] {
        let row = (self.classes + VOCABULARY_PITCH - VOCABULARY_BLOCK) * self.lane;
        let sums = |has: bool, rows: usize| match has {
            true => rows.saturating_mul(self.features * self.lane),
            false => 0,
        };
        [
            rows.saturating_mul(row.next_multiple_of(size_of::<Line>())),
            sums(self.has_hidden_sums, rows),
            sums(self.has_weight_sums, self.classes),
            if self.has_bias { self.classes * size_of::<f64>() } else { 0 },
        ]
    }

    /// Rows of a chunk that so many bytes are enough for; 0 if they are too few to be worth it.
    fn chunk_rows(&self, bytes: usize) -> usize {
        let total = |rows: usize| {
            let sum = self.chunk_bytes(rows).into_iter().fold(0, usize::saturating_add);
            // Each block of memory is rounded up to a line, and has UNRESERVED bytes at least.
            sum.saturating_add(4 * (size_of::<Line>() + UNRESERVED))
        };
        let each = total(1) - total(0);
        let affordable = bytes.saturating_sub(total(0)) / each;
        let most = self.rows.min(strategy::CHUNK_ROWS);
        match affordable.min(most) {
            enough if enough == most && most > 0 => most,
            some if some >= strategy::LEAST_CHUNK_ROWS => some,
            _ => 0,
        }
    }
}
