//! The memory of a linear loss: a fixed amount for each thread, all of it taken before anything is written.

use super::Job;
use crate::drivers::batch::Reduction;
use crate::error::Error;
use crate::kernels::product::DEPTH;
use crate::kernels::row_math::{ROWS, RowGroup, RowGroupExtras};
use crate::kernels::row_state::{ArgMax, RowState};
use crate::math::exp2::Shift;
use crate::plan::LinearGradient;
use crate::strategy::{self, VOCABULARY_BLOCK, VOCABULARY_PITCH};
use crate::view::FloatType;
use crate::worker::UNRESERVED;
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

/// Bytes that [`reserve`] asks for, for so many elements.
fn reserved_bytes<T>(len: usize) -> usize {
    len.saturating_mul(size_of::<T>()).max(if len == 0 { 0 } else { UNRESERVED })
}

/// An empty vector with room for `len` elements.
pub fn reserve<T>(len: usize) -> Result<Vec<T>, Error> {
    let mut vec = Vec::new();
    let len = reserved_bytes::<T>(len).div_ceil(size_of::<T>());
    match vec.try_reserve_exact(len) {
        Ok(()) => Ok(vec),
        Err(_) => Err(Error::Memory { bytes: len.saturating_mul(size_of::<T>()) }),
    }
}

/// Bytes of a cache line that may hold nothing yet.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code, reason = "raw memory")] MaybeUninit<[u8; 64]>);

/// Memory that holds nothing yet, aligned to a cache line.
pub struct Memory(Vec<Line>);

impl Memory {
    /// So many bytes, rounded up to lines.
    pub fn new(bytes: usize) -> Result<Memory, Error> {
        Ok(Memory(reserve(bytes.div_ceil(size_of::<Line>()))?))
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
    /// Hidden states in the lanes' type, if they have another.
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
    fn new(needs: &Needs, job: &Job) -> Result<Worker, Error> {
        let rows = needs.block_rows;
        let tile_rows = rows.max(needs.weight_rows);
        let most = tile_rows.max(VOCABULARY_BLOCK);
        let groups = rows.div_ceil(ROWS);
        let zeros = Memory::new(ZERO_BYTES)?;
        // SAFETY: the memory has so many bytes.
        unsafe { zeros.start().write_bytes(0, ZERO_BYTES) };
        Ok(Worker {
            zeros,
            tile: Memory::new(tile_rows * VOCABULARY_PITCH * job.lane)?,
            pack: Memory::new(DEPTH * VOCABULARY_BLOCK * job.lane)?,
            left: Memory::new(job.left_bytes(tile_rows))?,
            sums: Memory::new(needs.sums)?,
            groups: reserve(groups)?,
            extras: reserve(groups)?,
            states: reserve(rows)?,
            reductions: reserve(rows)?,
            shifts: reserve(rows)?,
            largest: reserve(rows)?,
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
    /// Takes the memory of all threads.
    pub fn new(needs: &Needs, job: &Job) -> Result<Workers, Error> {
        let mut workers = reserve(needs.threads)?;
        for _ in 0..needs.threads {
            workers.push(Worker::new(needs, job)?);
        }
        Ok(Workers(Mutex::new(workers)))
    }

    /// Lends a worker to the calling thread.
    pub fn with(&self, f: impl FnOnce(&mut Worker)) {
        let workers = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let worker = workers().pop();
        let mut worker = worker.expect("there is a worker for each thread");
        f(&mut worker);
        workers().push(worker);
    }
}

impl Job<'_> {
    /// Bytes of hidden states in the lanes' type.
    fn left_bytes(&self, rows: usize) -> usize {
        if self.linear.hidden.dtype.is_lane_type() { 0 } else { rows * DEPTH * self.lane }
    }

    /// Bytes of the sums of gradients, for so many rows of a row block.
    fn sums_bytes(&self, rows: usize) -> usize {
        let of = |gradient: Option<_>, rows: usize| match gradient {
            Some(gradient) if !self.is_direct(&gradient) => rows,
            _ => 0,
        };
        let rows = of(self.linear.hidden_gradient, rows)
            .max(of(self.linear.weight_gradient, VOCABULARY_BLOCK));
        rows * self.linear.features * self.lane
    }

    /// Bytes that a thread works in.
    fn worker_bytes(&self, needs: &Needs) -> usize {
        let (rows, tile_rows) = (needs.block_rows, needs.block_rows.max(needs.weight_rows));
        let tile = tile_rows * VOCABULARY_PITCH + DEPTH * VOCABULARY_BLOCK;
        let blocks = tile * self.lane + self.left_bytes(tile_rows);
        let groups = rows.div_ceil(ROWS);
        let states = reserved_bytes::<RowGroup>(groups)
            + reserved_bytes::<RowGroupExtras>(groups)
            + reserved_bytes::<RowState>(rows)
            + reserved_bytes::<Option<Reduction>>(rows)
            + reserved_bytes::<Shift>(rows)
            + reserved_bytes::<ArgMax>(rows);
        let addresses = 4 * reserved_bytes::<usize>(tile_rows.max(VOCABULARY_BLOCK));
        // Each of the four blocks of memory is rounded up to a line, each vector to whole elements.
        let fixed = size_of::<Worker>()
            + 4 * size_of::<Line>()
            + reserved_bytes::<Line>(1)
            + size_of::<RowGroup>()
            + size_of::<RowGroupExtras>()
            + size_of::<RowState>()
            + size_of::<Option<Reduction>>();
        blocks + needs.sums + states + addresses + fixed
    }

    /// Decides how rows are divided among threads, within the workspace.
    pub fn choose_block(&self, rows: usize, threads: usize) -> Result<Needs, Error> {
        let most = match self.linear.hidden.dtype {
            FloatType::F32 => strategy::LINEAR_ROWS,
            // Twice the bytes, or buffers of sums and hidden states beside the tile.
            FloatType::F64 | FloatType::Bf16 | FloatType::F16 => strategy::LINEAR_ROWS / 2,
        };
        // As many blocks as keep all threads busy until the end.
        let blocks = rows.div_ceil(most).next_multiple_of(threads).max(1);
        let block_rows =
            rows.max(1).div_ceil(blocks).next_multiple_of(strategy::LINEAR_ROWS_UNIT).min(most);
        let has_weight_pass =
            self.linear.weight_gradient.is_some() || self.linear.bias_gradient.is_some();
        let weight_rows = if has_weight_pass { most } else { 0 };
        let sums = self.sums_bytes(block_rows);
        let mut needs = Needs { block_rows, weight_rows, chunk_rows: 0, threads, sums };
        let workspace = self.linear.workspace;
        if workspace > 0 {
            let fixed = reserved_bytes::<usize>(rows)
                + reserved_bytes::<super::RowRecord>(rows)
                + reserved_bytes::<Worker>(threads)
                + size_of::<super::RowRecord>();
            let each = self.worker_bytes(&needs);
            let affordable = workspace.saturating_sub(fixed) / each;
            if affordable == 0 {
                return Err(Error::Param(format!(
                    "workspace = {workspace} is less than the {} bytes that this call needs",
                    fixed + each
                )));
            }
            needs.threads = threads.min(affordable);
            if self.call.plan.output.is_some() {
                let left = workspace - fixed - needs.threads * each;
                needs.chunk_rows = self.chunk_rows(rows, left);
            }
        }
        Ok(needs)
    }

    /// Bytes of a chunk of so many rows: of its logits, and of the sums of the gradients of hidden states, weight and
    /// bias.
    pub fn chunk_bytes(&self, rows: usize) -> [usize; 4] {
        let classes = self.call.plan.shape.classes;
        let of = |gradient: Option<LinearGradient>, rows: usize| match gradient {
            Some(gradient) if !self.is_direct(&gradient) => {
                rows.saturating_mul(self.linear.features * self.lane)
            }
            _ => 0,
        };
        let row = (classes + VOCABULARY_PITCH - VOCABULARY_BLOCK) * self.lane;
        [
            rows.saturating_mul(row.next_multiple_of(size_of::<Line>())),
            of(self.linear.hidden_gradient, rows),
            of(self.linear.weight_gradient, classes),
            self.linear.bias_gradient.map_or(0, |_| classes * size_of::<f64>()),
        ]
    }

    /// Rows of a chunk that so many bytes are enough for; 0 if they are too few to be worth it.
    fn chunk_rows(&self, rows: usize, bytes: usize) -> usize {
        let total = |rows: usize| {
            let sum = self.chunk_bytes(rows).into_iter().fold(0, usize::saturating_add);
            // Each block of memory is rounded up to a line, and has UNRESERVED bytes at least.
            sum.saturating_add(4 * (size_of::<Line>() + UNRESERVED))
        };
        let each = total(1) - total(0);
        let affordable = bytes.saturating_sub(total(0)) / each;
        let most = rows.min(strategy::CHUNK_ROWS);
        match affordable.min(most) {
            enough if enough == most && most > 0 => most,
            some if some >= strategy::LEAST_CHUNK_ROWS => some,
            _ => 0,
        }
    }
}
