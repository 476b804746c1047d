//! Vectors of real numbers, one small file of intrinsics for each instruction set.
//!
//! A kernel never sees a register width. It works on a *block* of virtual lanes, 64 of f32 or 32
//! of f64, which every instruction set covers with as many registers as it needs, and sums lanes
//! by the trees written down here. Which register a lane sits in therefore never shows in a
//! result: every set with fused multiply-add gives the same bits.

pub mod portable;

#[cfg(x86_sets)]
pub mod avx2;
#[cfg(x86_sets)]
pub mod avx512;

/// Low bits that a [range check](Simd::range_check) leaves out: an exponent of f64, or one of f32 in eighths.
pub const IGNORED_BITS: u32 = 11;

/// Where the lowest of an f32's eighths is shifted to: three bits below its exponent.
pub const EIGHTH_SHIFT: u32 = 20;

/// f64 lanes that a block is summed into.
pub const TOTALS: usize = 16;

/// What lanes hold: f32 or f64.
pub trait Real: Copy + PartialEq + PartialOrd + std::fmt::Debug + Send + Sync + 'static {
    /// Negative infinity.
    const NEG_INFINITY: Self;
    /// The largest number.
    const MAX: Self;
    /// 0
    const ZERO: Self;
    /// 0, 1, 2, …
    const NUMBERS: [Self; 32];

    /// Rounded to nearest.
    fn from_f64(x: f64) -> Self;
    /// Exactly.
    fn to_f64(self) -> f64;
}

macro_rules! real {
    ($type:ident) => {
        impl Real for $type {
            const NEG_INFINITY: Self = $type::NEG_INFINITY;
            const MAX: Self = $type::MAX;
            const ZERO: Self = 0.0;
            const NUMBERS: [Self; 32] = {
                let (mut numbers, mut i) = ([0.0; 32], 0);
                while i < numbers.len() {
                    numbers[i] = i as $type;
                    i += 1;
                }
                numbers
            };

            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $type
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
        }
    };
}
real!(f32);
real!(f64);

/// The vector instructions of one instruction set for one type of lanes, as a token: holding one
/// proves that the processor has the set, so its methods are safe to call.
///
/// Every method is `#[inline(always)]`. They carry no `#[target_feature]` of their own and take
/// on the features of the entry point (dispatch.rs) they end up in.
pub trait Simd: Copy {
    /// What a lane holds.
    type Real: Real;
    /// One register.
    type Vector: Copy;
    /// A block: an array of `BLOCK / LANES` registers, lane 0 first. Four or more independent
    /// chains hide the latency of an addition at two instructions a cycle; more than 8 registers
    /// would only lengthen the tails.
    type Block: Copy + AsRef<[Self::Vector]> + AsMut<[Self::Vector]>;
    /// One flag a lane.
    type Mask: Copy;
    /// What [`range_check`](Self::range_check) has seen.
    type RangeCheck: Copy;
    /// What [`scale`](Self::scale) looks eighths up in.
    type Exp2Table: Copy;
    /// The same set with lanes of f64.
    type Wide: Doubles<Wide = Self::Wide>;
    /// As many registers as there are lanes in 16 bytes.
    type Rows: Copy + AsRef<[Self::Vector]> + AsMut<[Self::Vector]>;
    /// A register of this type as registers of f64, lane 0 first.
    type Widened: Copy + AsRef<[WideVector<Self>]> + AsMut<[WideVector<Self>]>;
    /// [`TOTALS`] lanes of f64.
    type Totals: Copy + AsRef<[WideVector<Self>]> + AsMut<[WideVector<Self>]>;

    /// Lanes of one register.
    const LANES: usize;
    /// Lanes of a block: 256 bytes of them.
    const BLOCK: usize = 256 / size_of::<Self::Real>();

    /// The token.
    ///
    /// # Safety
    /// The processor has the set, and the calling entry point is compiled for it.
    unsafe fn assume() -> Self;
    /// The token for lanes of f64.
    fn wide(self) -> Self::Wide;

    /// `x` in every lane.
    fn splat(self, x: Self::Real) -> Self::Vector;
    /// `x` in every lane of a block.
    fn splat_block(self, x: Self::Real) -> Self::Block;
    /// All lanes 0.
    fn totals(self) -> Self::Totals;

    /// The `LANES` values at `p`, which may have any alignment.
    ///
    /// # Safety
    /// `p` is valid for reads of `LANES` values.
    unsafe fn load(self, p: *const Self::Real) -> Self::Vector;
    /// The values at `p` whose bit is set in `lanes`, `fill` elsewhere. Memory behind a clear
    /// bit is not touched.
    ///
    /// # Safety
    /// For every set bit `i`, `p + i` is valid for reads.
    unsafe fn load_lanes(self, p: *const Self::Real, lanes: u32, fill: Self::Real) -> Self::Vector;
    /// Writes `LANES` values to `p`, which may have any alignment.
    ///
    /// # Safety
    /// `p` is valid for writes of `LANES` values.
    unsafe fn store(self, p: *mut Self::Real, v: Self::Vector);
    /// Writes the lanes whose bit is set in `lanes`; other memory is not touched.
    ///
    /// # Safety
    /// For every set bit `i`, `p + i` is valid for writes.
    unsafe fn store_lanes(self, p: *mut Self::Real, lanes: u32, v: Self::Vector);
    /// The 16 bytes of each of `LANES` rows that begin `step` elements apart, transposed: lane l of
    /// register i is element i of row l.
    ///
    /// # Safety
    /// All of it is valid for reads.
    unsafe fn load_rows(self, p: *const Self::Real, step: isize) -> Self::Rows;
    /// Writes what [`load_rows`](Self::load_rows) would read.
    ///
    /// # Safety
    /// All of it is valid for writes.
    unsafe fn store_rows(self, p: *mut Self::Real, step: isize, v: Self::Rows);
    /// Writes `LANES` values around the caches where the set can, else as [`store`](Self::store).
    /// [`fence`](Self::fence) orders such writes before later ones.
    ///
    /// # Safety
    /// `p` is valid for writes of `LANES` values and aligned to the size of a register.
    unsafe fn stream(self, p: *mut Self::Real, v: Self::Vector);
    /// Makes streamed writes visible before any later write.
    fn fence(self);
    /// Asks for the cache line at `p`; never faults, whatever `p` is.
    fn prefetch(self, p: *const u8);
    /// As [`prefetch`](Self::prefetch), but into the second level of cache alone.
    fn prefetch_l2(self, p: *const u8);
    /// Asks for the cache line at `p`, to be written.
    fn prefetch_write(self, p: *const u8);

    /// `a + b`
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a - b`
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b`
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a / b`
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`, with one rounding where the set has it, else with two.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// `a * b - c` in which the product is not rounded, on every set: what argument reduction
    /// relies on when product and subtrahend nearly cancel.
    fn mul_sub_exact(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The larger of the two, and `x` if either is NaN.
    fn max(self, bound: Self::Vector, x: Self::Vector) -> Self::Vector;
    /// The smaller of the two, and `x` if either is NaN.
    fn min(self, bound: Self::Vector, x: Self::Vector) -> Self::Vector;
    /// A table for [`scale`](Self::scale), in registers; f64 has none.
    fn exp2_table(self, bits: &[u32; 8]) -> Self::Exp2Table;
    /// Turns an integer that sits in the low bits into a power of 2, by shifting it to where the biased
    /// exponent is. In lanes of f32 it counts eighths: the lowest of them goes to bit [`EIGHTH_SHIFT`],
    /// and to the integer of all bits that which the lowest three point to in the table is added.
    fn scale(self, table: Self::Exp2Table, m: Self::Vector) -> Self::Vector;

    /// `a < b`; false with NaN.
    fn less(self, a: Self::Vector, b: Self::Vector) -> Self::Mask;
    /// `a == b`; false with NaN.
    fn equal(self, a: Self::Vector, b: Self::Vector) -> Self::Mask;
    /// `a` where the mask is set, `b` elsewhere.
    fn select(self, mask: Self::Mask, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// Set where both are.
    fn both(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// Set where one of them is.
    fn either(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// One bit a lane.
    fn bits(self, mask: Self::Mask) -> u32;

    /// Nothing seen.
    fn range_check_start(self) -> Self::RangeCheck;
    /// Notes where the bits of a lane differ from those of `expected`.
    fn range_check(
        self,
        seen: Self::RangeCheck,
        block: &Self::Block,
        expected: Self::Vector,
    ) -> Self::RangeCheck;
    /// Whether nowhere any but the lowest [`IGNORED_BITS`] bits differed.
    fn range_check_passed(self, seen: Self::RangeCheck) -> bool;

    /// The largest lane; no lane is NaN.
    fn max_lane(self, v: Self::Vector) -> Self::Real;
    /// The lanes in f64.
    fn widen(self, v: Self::Vector) -> Self::Widened;
    /// The lanes rounded from f64.
    fn narrow(self, v: Self::Widened) -> Self::Vector;
    /// Sum of the totals: halves are added lane by lane, 16 → 8 → 4 → 2 → 1.
    fn sum(self, totals: Self::Totals) -> f64;

    /// The largest lane of a block without NaN.
    #[inline(always)]
    fn max_of_block(self, block: Self::Block) -> Self::Real {
        let (first, rest) = block.as_ref().split_first().expect("a block has registers");
        self.max_lane(rest.iter().fold(*first, |max, &v| self.max(max, v)))
    }

    /// Adds a block to the totals: 16 lanes at a time are added up in lanes of their own type, by
    /// a tree, `(b[l] + b[l+16]) + (b[l+32] + b[l+48])`, and the sums to lane `l` in f64.
    #[inline(always)]
    fn add_block(self, totals: &mut Self::Totals, block: &Self::Block) {
        let block = block.as_ref();
        let registers = TOTALS / Self::LANES;
        for i in 0..registers {
            let at = |group: usize| block[group * registers + i];
            let mut v = self.add(at(0), at(1));
            if Self::BLOCK == 64 {
                v = self.add(v, self.add(at(2), at(3)));
            }
            self.add_wide(totals, i, self.widen(v));
        }
    }

    /// Adds the lanes of register `i` of a block to the totals: lane `l` of the block to lane
    /// `l mod 16`.
    #[inline(always)]
    fn add_wide(self, totals: &mut Self::Totals, i: usize, v: Self::Widened) {
        let (wide, v) = (self.wide(), v.as_ref());
        for (j, &v) in v.iter().enumerate() {
            let total = &mut totals.as_mut()[(i * v_len::<Self>() + j) % totals_len::<Self>()];
            *total = wide.add(*total, v);
        }
    }
}

/// One register of f64 of the same set.
pub type WideVector<S> = <<S as Simd>::Wide as Simd>::Vector;

/// Registers of f64 that one register widens to.
const fn v_len<S: Simd>() -> usize {
    S::LANES / <S::Wide as Simd>::LANES
}

/// Registers of f64 that the totals take.
const fn totals_len<S: Simd>() -> usize {
    TOTALS / <S::Wide as Simd>::LANES
}

/// What lanes of f32 can do with halves.
pub trait Halves: Simd<Real = f32> {
    /// `LANES` halves, as bits.
    type Halves: Copy;

    /// The `LANES` halves at `p`, aligned to 2 bytes.
    ///
    /// # Safety
    /// As [`load`](Simd::load).
    unsafe fn load_halves(self, p: *const u16) -> Self::Halves;
    /// The halves at `p` whose bit is set in `lanes`, `fill` elsewhere.
    ///
    /// # Safety
    /// As [`load_lanes`](Simd::load_lanes).
    unsafe fn load_half_lanes(self, p: *const u16, lanes: u32, fill: u16) -> Self::Halves;
    /// Writes `LANES` halves.
    ///
    /// # Safety
    /// As [`store`](Simd::store).
    unsafe fn store_halves(self, p: *mut u16, v: Self::Halves);
    /// Writes the halves whose bit is set in `lanes`.
    ///
    /// # Safety
    /// As [`store_lanes`](Simd::store_lanes).
    unsafe fn store_half_lanes(self, p: *mut u16, lanes: u32, v: Self::Halves);
    /// Writes `LANES` halves as [`stream`](Simd::stream) does.
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
}

/// What lanes of f64 can do besides: the logarithm takes numbers apart.
pub trait Doubles: Simd<Real = f64, Exp2Table = ()> {
    /// `(k, m)` with `x = m·2^k` and m in [√½, √2), for x positive, finite and normal; anything
    /// for others.
    fn split(self, x: Self::Vector) -> (Self::Vector, Self::Vector);
}

/// The bits of register `i` out of a mask of a block's lanes.
#[inline(always)]
pub fn lanes_of<S: Simd>(mask: u64, i: usize) -> u32 {
    (mask >> (i * S::LANES)) as u32 & ((1u64 << S::LANES) - 1) as u32
}

/// A mask of the first `n < 64` lanes.
#[inline(always)]
pub fn first_lanes(n: usize) -> u64 {
    (1u64 << n) - 1
}

/// A mask of the first `n` lanes of a register, or of all if there are no more than `n`.
#[inline(always)]
pub fn up_to<S: Simd>(n: usize) -> u32 {
    ((1u64 << n.min(S::LANES)) - 1) as u32
}

/// A mask of all lanes of a block.
#[inline(always)]
pub fn all_lanes<S: Simd>() -> u64 {
    !0 >> (64 - S::BLOCK)
}

/// For [`Doubles::split`]: the bits of √½, and of 1, whose exponent is the bias.
const SQRT_HALF: u64 = std::f64::consts::FRAC_1_SQRT_2.to_bits();
const ONE: u64 = 1.0f64.to_bits();
/// Sign and exponent.
const EXPONENT: u64 = 0xFFF << 52;
/// 2^52: or'ed into it, an integer below 2^52 is the fraction of a number.
const TWO_52: u64 = 4_503_599_627_370_496.0f64.to_bits();
const TWO_52_AND_BIAS: f64 = 4_503_599_627_370_496.0 + 1023.0;

/// The values at `p` whose bit is set among the lowest `N` of `lanes`, `fill` elsewhere: for sets
/// without a masked load of that width. One by one, and not unrolled: tails are short.
///
/// # Safety
/// As [`Simd::load_lanes`]; `p` is aligned.
#[inline(always)]
unsafe fn read_lanes<T: Copy, const N: usize>(p: *const T, lanes: u32, fill: T) -> [T; N] {
    let all = (1 << N) - 1;
    if lanes & all == all {
        // SAFETY: the caller's promise.
        return unsafe { *p.cast() };
    }
    let mut values = [fill; N];
    let mut rest = lanes & all;
    while rest != 0 {
        let i = rest.trailing_zeros() as usize;
        // SAFETY: a lane that the caller vouches for.
        values[i] = unsafe { *p.add(i) };
        rest &= rest - 1;
    }
    values
}

/// Writes the values whose bit is set among the lowest `N` of `lanes`, as [`read_lanes`] reads.
///
/// # Safety
/// As [`Simd::store_lanes`]; `p` is aligned.
#[inline(always)]
unsafe fn write_lanes<T: Copy, const N: usize>(p: *mut T, lanes: u32, values: [T; N]) {
    let mut rest = lanes & ((1 << N) - 1);
    while rest != 0 {
        let i = rest.trailing_zeros() as usize;
        // SAFETY: a lane that the caller vouches for.
        unsafe { *p.add(i) = values[i] };
        rest &= rest - 1;
    }
}
