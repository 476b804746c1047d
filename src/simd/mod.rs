//! Vectors of real numbers, one small file of intrinsics for each instruction set.
//!
//! A kernel never sees a register width. It works on a *block* of [`BLOCK`] virtual lanes,
//! which every instruction set covers with as many registers as it needs, and sums lanes by
//! the trees written down here. Which register a lane sits in therefore never shows in a
//! result: every set with fused multiply-add gives the same bits.

pub mod portable;

#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;

/// Virtual lanes a block: 4 registers of AVX-512, 8 of AVX2. Four independent chains hide the
/// latency of an addition at two instructions a cycle; more would only lengthen the tails.
pub const BLOCK: usize = 64;

/// The vector instructions of one instruction set, as a token: holding one proves that the
/// processor has the set, so its methods are safe to call.
///
/// Every method is `#[inline(always)]`. They carry no `#[target_feature]` of their own and take
/// on the features of the entry point (dispatch.rs) they end up in.
pub trait Simd: Copy {
    /// One register.
    type Vector: Copy;
    /// [`BLOCK`] lanes: an array of `BLOCK / LANES` registers, lane 0 first.
    type Block: Copy + AsRef<[Self::Vector]> + AsMut<[Self::Vector]>;
    /// 16 lanes of f64.
    type Totals: Copy;
    /// `LANES` halves, as bits.
    type Halves: Copy;
    /// What [`watch`](Self::watch) has seen.
    type Watch: Copy;

    /// f32 lanes of one register.
    const LANES: usize;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::Vector;
    /// `x` in every lane of a block.
    fn splat_block(self, x: f32) -> Self::Block;

    /// The `LANES` values at `p`, which may have any alignment.
    ///
    /// # Safety
    /// `p` is valid for reads of `LANES` values.
    unsafe fn load(self, p: *const f32) -> Self::Vector;
    /// The values at `p` whose bit is set in `lanes`, `fill` elsewhere. Memory behind a clear
    /// bit is not touched.
    ///
    /// # Safety
    /// For every set bit `i`, `p + i` is valid for reads.
    unsafe fn load_lanes(self, p: *const f32, lanes: u32, fill: f32) -> Self::Vector;
    /// Writes `LANES` values to `p`, which may have any alignment.
    ///
    /// # Safety
    /// `p` is valid for writes of `LANES` values.
    unsafe fn store(self, p: *mut f32, v: Self::Vector);
    /// Writes the lanes whose bit is set in `lanes`; other memory is not touched.
    ///
    /// # Safety
    /// For every set bit `i`, `p + i` is valid for writes.
    unsafe fn store_lanes(self, p: *mut f32, lanes: u32, v: Self::Vector);
    /// Writes `LANES` values around the caches where the set can, else as [`store`](Self::store).
    /// [`fence`](Self::fence) orders such writes before later ones.
    ///
    /// # Safety
    /// `p` is valid for writes of `LANES` values and aligned to the size of a register.
    unsafe fn stream(self, p: *mut f32, v: Self::Vector);
    /// The `LANES` halves at `p`, aligned to 2 bytes.
    ///
    /// # Safety
    /// As [`load`](Self::load).
    unsafe fn load_halves(self, p: *const u16) -> Self::Halves;
    /// The halves at `p` whose bit is set in `lanes`, `fill` elsewhere.
    ///
    /// # Safety
    /// As [`load_lanes`](Self::load_lanes).
    unsafe fn load_half_lanes(self, p: *const u16, lanes: u32, fill: u16) -> Self::Halves;
    /// Writes `LANES` halves.
    ///
    /// # Safety
    /// As [`store`](Self::store).
    unsafe fn store_halves(self, p: *mut u16, v: Self::Halves);
    /// Writes the halves whose bit is set in `lanes`.
    ///
    /// # Safety
    /// As [`store_lanes`](Self::store_lanes).
    unsafe fn store_half_lanes(self, p: *mut u16, lanes: u32, v: Self::Halves);
    /// Writes `LANES` halves as [`stream`](Self::stream) does.
    ///
    /// # Safety
    /// As there.
    unsafe fn stream_halves(self, p: *mut u16, v: Self::Halves);
    /// bf16 to f32, exactly.
    fn widen_bf16(self, v: Self::Halves) -> Self::Vector;
    /// f32 to bf16, to nearest even; NaN stays NaN.
    fn narrow_bf16(self, v: Self::Vector) -> Self::Halves;
    /// f16 to f32, exactly.
    fn widen_f16(self, v: Self::Halves) -> Self::Vector;
    /// f32 to f16, to nearest even; NaN stays NaN.
    fn narrow_f16(self, v: Self::Vector) -> Self::Halves;
    /// Makes streamed writes visible before any later write.
    fn fence(self);
    /// Asks for the cache line at `p`; never faults, whatever `p` is.
    fn prefetch(self, p: *const u8);
    /// As [`prefetch`](Self::prefetch), but into the second level of cache alone.
    fn prefetch_far(self, p: *const u8);
    /// Asks for the cache line at `p`, to be written.
    fn prefetch_write(self, p: *const u8);

    /// `a + b`
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a - b`
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b`
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`, with one rounding where the set has it, else with two.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// `a * b - c` in which the product is not rounded, on every set: what argument reduction
    /// relies on when product and subtrahend nearly cancel.
    fn mul_sub_exact(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The larger of the two, and `x` if either is NaN.
    fn max(self, bound: Self::Vector, x: Self::Vector) -> Self::Vector;
    /// The smaller of the two, and `x` if either is NaN.
    fn min(self, bound: Self::Vector, x: Self::Vector) -> Self::Vector;
    /// The bits of every lane shifted left by 23, read as a float again: turns an integer that
    /// sits in the low bits of a float into a biased exponent.
    fn exponent_from_low_bits(self, m: Self::Vector) -> Self::Vector;

    /// Nothing seen.
    fn watch_start(self) -> Self::Watch;
    /// Notes where the bits of a lane differ from those of `expected`.
    fn watch(self, seen: Self::Watch, block: &Self::Block, expected: Self::Vector) -> Self::Watch;
    /// Whether nowhere any but the lowest 8 bits differed.
    fn watch_end(self, seen: Self::Watch) -> bool;

    /// The largest lane; NaN lanes count for nothing unless all are NaN.
    fn max_lane(self, block: Self::Block) -> f32;
    /// All lanes 0.
    fn totals(self) -> Self::Totals;
    /// Adds a block to the totals: lane `l` of 16 gets `(b[l] + b[l+16]) + (b[l+32] + b[l+48])`,
    /// those three additions in f32, the last in f64.
    fn add_block(self, totals: Self::Totals, block: Self::Block) -> Self::Totals;
    /// Adds `x - center` in f64, lane by lane, for register `i` of a block: lane `l` of the block
    /// goes to lane `l mod 16` of the totals.
    fn add_centered(self, totals: &mut Self::Totals, i: usize, x: Self::Vector, center: f64);
    /// Adds `w·(x - center)` in f64, as [`add_centered`](Self::add_centered); 0 where w is ±0,
    /// whatever x is.
    fn add_weighted(
        self,
        totals: &mut Self::Totals,
        i: usize,
        x: Self::Vector,
        center: f64,
        w: Self::Vector,
    );
    /// Sum of the totals: halves are added lane by lane, 16 → 8 → 4 → 2 → 1.
    fn sum(self, totals: Self::Totals) -> f64;
}

/// The values at `p` whose bit is set among the lowest 8 of `lanes`, `fill` elsewhere: for sets
/// without a masked load of that width. One by one, and not unrolled: tails are short.
///
/// # Safety
/// As [`Simd::load_lanes`]; `p` is aligned.
#[inline(always)]
unsafe fn read_lanes<T: Copy>(p: *const T, lanes: u32, fill: T) -> [T; 8] {
    let mut values = [fill; 8];
    let mut rest = lanes & 0xFF;
    while rest != 0 {
        let i = rest.trailing_zeros() as usize;
        // SAFETY: a lane that the caller vouches for.
        values[i] = unsafe { *p.add(i) };
        rest &= rest - 1;
    }
    values
}

/// Writes the values whose bit is set among the lowest 8 of `lanes`, as [`read_lanes`] reads.
///
/// # Safety
/// As [`Simd::store_lanes`]; `p` is aligned.
#[inline(always)]
unsafe fn write_lanes<T: Copy>(p: *mut T, lanes: u32, values: [T; 8]) {
    let mut rest = lanes & 0xFF;
    while rest != 0 {
        let i = rest.trailing_zeros() as usize;
        // SAFETY: a lane that the caller vouches for.
        unsafe { *p.add(i) = values[i] };
        rest &= rest - 1;
    }
}
