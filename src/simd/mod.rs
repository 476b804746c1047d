//! Vectors of floats: one trait, and one file of intrinsics for each instruction set.
//!
//! A kernel never sees the width of a register. It works on a *block* of virtual lanes: 64 of f32
//! or 32 of f64. Each instruction set covers a block with as many registers as it needs. The trees
//! in this file fix the order in which lanes are summed, so the register that a lane sits in never
//! changes a result: every set gives the same bits.

mod fused;
#[cfg(test)]
pub mod on_isa;
pub mod portable;

#[cfg(x86_sets)]
pub mod avx2;
#[cfg(x86_sets)]
pub mod avx512;
#[cfg(x86_sets)]
mod x86;

/// The number of f64 lanes that a block is summed into.
pub const TOTALS: usize = 16;

/// A 1 for each lane of a register of f64, of whatever set.
pub static ONES: [f64; 16] = [1.0; 16];

/// The type of a lane: f32 or f64.
pub trait Real: Copy + PartialEq + PartialOrd + std::fmt::Debug + Send + Sync + 'static {
    /// Negative infinity.
    const NEG_INFINITY: Self;
    /// The largest finite number.
    const MAX: Self;
    /// 0
    const ZERO: Self;
    /// The numbers 0 to 63.
    const NUMBERS: &'static [Self; 64];
    /// An integer of as many bits.
    type Bits: Copy;
    /// [`Simd::scale`] shifts the lowest bit of the eighths to this bit, three below the exponent.
    const EIGHTH_SHIFT: u32;
    /// The low bits that a [range check](Simd::range_check) ignores. They hold the biased exponent and the eighth below
    /// it.
    const IGNORED_BITS: u32;
    /// Whether sums of lanes keep what they lose: nothing wider adds up those of f64. These rows are not smoothed.
    const COMPENSATES: bool = size_of::<Self>() == 8;

    /// `self + x`, rounded to the type.
    fn plus(self, x: Self) -> Self;
    /// `self - x`, rounded to the type.
    fn minus(self, x: Self) -> Self;
    /// `self * x`, rounded to the type.
    fn times(self, x: Self) -> Self;
    /// Rounds to nearest.
    fn from_f64(x: f64) -> Self;
    /// Converts exactly.
    fn to_f64(self) -> f64;
}

macro_rules! real {
    ($type:ident, $bits:ident) => {
        impl Real for $type {
            type Bits = $bits;
            const EIGHTH_SHIFT: u32 = $type::MANTISSA_DIGITS - 1 - 3;
            const IGNORED_BITS: u32 = size_of::<$type>() as u32 * 8 - $type::MANTISSA_DIGITS + 3;
            const NEG_INFINITY: Self = $type::NEG_INFINITY;
            const MAX: Self = $type::MAX;
            const ZERO: Self = 0.0;
            const NUMBERS: &'static [Self; 64] = &{
                let (mut numbers, mut i) = ([0.0; 64], 0);
                while i < numbers.len() {
                    numbers[i] = i as $type;
                    i += 1;
                }
                numbers
            };

            #[inline(always)]
            fn plus(self, x: Self) -> Self {
                self + x
            }
            #[inline(always)]
            fn minus(self, x: Self) -> Self {
                self - x
            }
            #[inline(always)]
            fn times(self, x: Self) -> Self {
                self * x
            }
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
real!(f32, u32);
real!(f64, u64);

/// The vector instructions of one instruction set for one type of lanes.
///
/// The implementing type is a token. A value of it proves that the processor has the set, so most
/// methods are safe to call.
///
/// Every method is `#[inline(always)]` and has no `#[target_feature]`: the compiler inlines it into
/// an entry point (dispatch.rs) and compiles it with the features of that entry point.
pub trait Simd: Copy {
    /// The type of a lane.
    type Real: Real;
    /// One register.
    type Vector: Copy;
    /// A block: an array of `BLOCK / LANES` registers, lane 0 first. Four or more independent
    /// chains of additions hide their latency at two instructions a cycle. More than 8 registers
    /// would only lengthen the tails.
    type Block: Copy + AsRef<[Self::Vector]> + AsMut<[Self::Vector]>;
    /// One flag for each lane.
    type Mask: Copy;
    /// The state of a [`range_check`](Self::range_check).
    type RangeCheck: Copy;
    /// The table of eighths for [`scale`](Self::scale).
    type Exp2Table: Copy;
    /// The token of the same set for lanes of f64.
    type Wide: Doubles<Wide = Self::Wide>;
    /// As many registers as 16 bytes hold lanes.
    type Rows: Copy + AsRef<[Self::Vector]> + AsMut<[Self::Vector]>;
    /// The registers of f64 that one register widens to, lane 0 first.
    type Widened: Copy + AsRef<[WideVector<Self>]> + AsMut<[WideVector<Self>]>;
    /// [`TOTALS`] lanes of f64.
    type Totals: Copy + AsRef<[WideVector<Self>]> + AsMut<[WideVector<Self>]>;

    /// The lanes of a register.
    const LANES: usize;
    /// The lanes of a block, which has 256 bytes.
    const BLOCK: usize = 256 / size_of::<Self::Real>();

    /// Makes the token.
    ///
    /// # Safety
    /// The processor has the set, and the caller is inlined into a function that is compiled for
    /// the features of the set.
    unsafe fn assume() -> Self;
    /// Returns the token for lanes of f64.
    fn wide(self) -> Self::Wide;

    /// Sets every lane to `x`.
    fn splat(self, x: Self::Real) -> Self::Vector;
    /// Sets every lane to `x`, a constant of a loop that needs more of them than the set has registers. Where instructions
    /// cannot broadcast an operand, the compiler is not told what it is: it would broadcast it again for each use, which
    /// takes an instruction, where a register that it keeps in memory is an operand.
    #[inline(always)]
    fn constant(self, x: Self::Real) -> Self::Vector {
        self.splat(x)
    }
    /// Sets every lane of a block to `x`.
    fn splat_block(self, x: Self::Real) -> Self::Block;
    /// `x` in every lane of a register's rows.
    fn splat_rows(self, x: Self::Real) -> Self::Rows;
    /// Sets all totals to 0.
    fn totals(self) -> Self::Totals;

    /// Loads `LANES` values from `p`, which may have any alignment.
    ///
    /// # Safety
    /// `p` is valid for reads of `LANES` values.
    unsafe fn load(self, p: *const Self::Real) -> Self::Vector;
    /// Loads the lanes whose bit is set in `lanes` and sets the others to `fill`. It does not touch
    /// the memory of a lane whose bit is clear.
    ///
    /// # Safety
    /// `p` is aligned to its type. For every set bit `i` below `LANES`, `p + i` is valid for reads.
    unsafe fn load_lanes(self, p: *const Self::Real, lanes: u32, fill: Self::Real) -> Self::Vector;
    /// Stores `LANES` values to `p`, which may have any alignment.
    ///
    /// # Safety
    /// `p` is valid for writes of `LANES` values.
    unsafe fn store(self, p: *mut Self::Real, v: Self::Vector);
    /// Stores the lanes whose bit is set in `lanes`. It does not touch the memory of the others.
    ///
    /// # Safety
    /// `p` is aligned to its type. For every set bit `i` below `LANES`, `p + i` is valid for writes.
    unsafe fn store_lanes(self, p: *mut Self::Real, lanes: u32, v: Self::Vector);
    /// Loads 16 bytes from each of `LANES` rows and transposes them: lane l of register i is
    /// element i of row l. Row l begins at `p + l·step`.
    ///
    /// # Safety
    /// `p` is aligned to its type. The first 16 bytes of each row are valid for reads.
    unsafe fn load_rows(self, p: *const Self::Real, step: isize) -> Self::Rows;
    /// Stores the 16 bytes of each row that [`load_rows`](Self::load_rows) loads.
    ///
    /// # Safety
    /// `p` is aligned to its type. The first 16 bytes of each row are valid for writes.
    unsafe fn store_rows(self, p: *mut Self::Real, step: isize, v: Self::Rows);
    /// Stores `LANES` values past the caches if the set can, else as [`store`](Self::store) does.
    /// [`fence`](Self::fence) orders such stores before later ones.
    ///
    /// # Safety
    /// `p` is valid for writes of `LANES` values and aligned to the size of a register.
    unsafe fn stream(self, p: *mut Self::Real, v: Self::Vector);
    /// Makes streamed stores visible before any later store.
    fn fence(self);
    /// Prefetches the cache line at `p`. It never faults, whatever `p` is.
    fn prefetch(self, p: *const u8);
    /// Prefetches the cache line at `p` into the second level of cache only.
    fn prefetch_l2(self, p: *const u8);
    /// Prefetches the cache line at `p` for a write.
    fn prefetch_write(self, p: *const u8);

    /// `a + b`
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a - b`
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b`
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a / b`
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// `a * b - c`, rounded once.
    fn mul_sub(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The set has fused multiply-add. Without, an exponential takes so long that kernels are compiled for as few cases
    /// as there are.
    const FUSED: bool = true;

    /// Whether loading some lanes takes no longer than loading all.
    const MASKS_LOADS: bool = false;

    /// Whether what follows a loop for each of its turns is faster in a loop of its own. A core looks ahead as far as it
    /// has registers to rename; where a turn takes many of them, it waits for the end of each turn's longest chain.
    const SPLITS_LOOPS: bool = true;

    /// Returns `f()`, a long computation of lanes. A set without fused multiply-add calls it as a function,
    /// since inlined it would be most of the code of each kernel. `f` is `#[inline(always)]`.
    #[inline(always)]
    fn apart<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }
    /// The larger of the two; `x` if either is NaN.
    fn max(self, bound: Self::Vector, x: Self::Vector) -> Self::Vector;
    /// The smaller of the two; `x` if either is NaN.
    fn min(self, bound: Self::Vector, x: Self::Vector) -> Self::Vector;
    /// Loads the table for [`scale`](Self::scale) into registers.
    fn exp2_table(self, bits: &[<Self::Real as Real>::Bits; 8]) -> Self::Exp2Table;
    /// Turns the integer in the low bits of `m`, which counts eighths, into a power of 2, by shifting it to the place of
    /// the biased exponent: its lowest bit goes to bit [`EIGHTH_SHIFT`](Real::EIGHTH_SHIFT). Its lowest three bits select
    /// the entry of the table that is added to the bits of the result as an integer. In lanes of f64, the lowest three bits
    /// of the upper half of m are 0.
    fn scale(self, table: Self::Exp2Table, m: Self::Vector) -> Self::Vector;

    /// `a < b`; false if either is NaN.
    fn less(self, a: Self::Vector, b: Self::Vector) -> Self::Mask;
    /// `a == b`; false if either is NaN.
    fn equal(self, a: Self::Vector, b: Self::Vector) -> Self::Mask;
    /// Not `a < b`: true if either is NaN.
    fn not_less(self, a: Self::Vector, b: Self::Vector) -> Self::Mask;
    /// Not `a < b` in lanes whose flag is set; false in the others.
    #[inline(always)]
    fn not_less_where(self, mask: Self::Mask, a: Self::Vector, b: Self::Vector) -> Self::Mask {
        self.both(mask, self.not_less(a, b))
    }
    /// Not `a == b`: true if either is NaN.
    fn not_equal(self, a: Self::Vector, b: Self::Vector) -> Self::Mask;
    /// `a` in lanes whose flag is set, `b` in the others.
    fn select(self, mask: Self::Mask, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `v` in lanes whose flag is set, 0 in the others.
    fn keep(self, mask: Self::Mask, v: Self::Vector) -> Self::Vector;
    /// The logical and of two masks.
    fn both(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// The logical or of two masks.
    fn either(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// The flag of lane `i` as bit `i`.
    fn bits(self, mask: Self::Mask) -> u32;

    /// Begins a range check.
    fn range_check_start(self) -> Self::RangeCheck;
    /// Records the bits in which a lane of the block differs from `expected`.
    fn range_check(
        self,
        seen: Self::RangeCheck,
        block: &Self::Block,
        expected: Self::Vector,
    ) -> Self::RangeCheck;
    /// Returns whether every recorded difference is within the lowest [`IGNORED_BITS`](Real::IGNORED_BITS) bits.
    fn range_check_passed(self, seen: Self::RangeCheck) -> bool;

    /// The largest lane of a register without NaN.
    fn max_lane(self, v: Self::Vector) -> Self::Real;
    /// Converts the lanes to f64, exactly.
    fn widen(self, v: Self::Vector) -> Self::Widened;
    /// Rounds lanes of f64 to nearest.
    fn narrow(self, v: Self::Widened) -> Self::Vector;
    /// The sum of the totals: adds the upper half to the lower lane by lane, 16 → 8 → 4 → 2 → 1.
    fn sum(self, totals: Self::Totals) -> f64;

    /// The largest lane of a block without NaN.
    #[inline(always)]
    fn max_of_block(self, block: Self::Block) -> Self::Real {
        let (first, rest) = block.as_ref().split_first().expect("a block has registers");
        self.max_lane(rest.iter().fold(*first, |max, &v| self.max(max, v)))
    }

    /// Adds a block to the totals. The lanes `l`, `l + 16`, … are summed in their own type, by the
    /// tree `(b[l] + b[l+16]) + (b[l+32] + b[l+48])`, and the sum is added to total `l` in f64.
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

    /// Adds the lanes of register `i` of a block to the totals: lane `l` of the block to total
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

/// A register of f64 of the same set.
pub type WideVector<S> = <<S as Simd>::Wide as Simd>::Vector;

/// The registers of f64 that one register widens to.
pub const fn v_len<S: Simd>() -> usize {
    S::LANES / <S::Wide as Simd>::LANES
}

/// The registers of f64 that hold the totals.
const fn totals_len<S: Simd>() -> usize {
    TOTALS / <S::Wide as Simd>::LANES
}

/// Loads, stores and conversions of 16-bit floats, in lanes of f32.
pub trait Halves: Simd<Real = f32> {
    /// `LANES` 16-bit floats, as bits.
    type Halves: Copy;

    /// Loads `LANES` halves from `p`.
    ///
    /// # Safety
    /// `p` is valid for reads of `LANES` halves and aligned to 2 bytes.
    unsafe fn load_halves(self, p: *const u16) -> Self::Halves;
    /// Loads the halves whose bit is set in `lanes` and sets the others to `fill`. It does not touch
    /// the memory of a half whose bit is clear.
    ///
    /// # Safety
    /// `p` is aligned to 2 bytes. For every set bit `i` below `LANES`, `p + i` is valid for reads.
    unsafe fn load_half_lanes(self, p: *const u16, lanes: u32, fill: u16) -> Self::Halves;
    /// Stores `LANES` halves to `p`.
    ///
    /// # Safety
    /// `p` is valid for writes of `LANES` halves and aligned to 2 bytes.
    unsafe fn store_halves(self, p: *mut u16, v: Self::Halves);
    /// Stores the halves whose bit is set in `lanes`. It does not touch the memory of the others.
    ///
    /// # Safety
    /// `p` is aligned to 2 bytes. For every set bit `i` below `LANES`, `p + i` is valid for writes.
    unsafe fn store_half_lanes(self, p: *mut u16, lanes: u32, v: Self::Halves);
    /// Stores `LANES` halves as [`stream`](Simd::stream) does.
    ///
    /// # Safety
    /// `p` is valid for writes of `LANES` halves and aligned to the size of all of them.
    unsafe fn stream_halves(self, p: *mut u16, v: Self::Halves);
    /// Converts bf16 to f32, exactly.
    fn widen_bf16(self, v: Self::Halves) -> Self::Vector;
    /// Rounds f32 to bf16, to nearest even; NaN stays NaN.
    fn narrow_bf16(self, v: Self::Vector) -> Self::Halves;
    /// Converts f16 to f32, exactly.
    fn widen_f16(self, v: Self::Halves) -> Self::Vector;
    /// Rounds f32 to f16, to nearest even; NaN stays NaN.
    fn narrow_f16(self, v: Self::Vector) -> Self::Halves;
}

/// Products of pairs of bf16, which some processors with a set have and others do not.
#[cfg(x86_sets)]
pub trait PairProducts: Halves {
    /// Puts bf16 numbers, widened to lanes of f32, beside each other: `first` into the lower half of each lane.
    fn join_pairs(self, first: Self::Vector, second: Self::Vector) -> Self::Vector;
    /// `a₀·b₀ + (a₁·b₁ + sum)` in each lane, where a₀ is in the lower half; each multiplication and addition is
    /// rounded once, to nearest, and subnormal numbers are zeros.
    ///
    /// # Safety
    /// The processor has AVX512_BF16, and the caller is inlined into a function that is compiled for it.
    unsafe fn multiply_pairs(
        self,
        a: Self::Vector,
        b: Self::Vector,
        sum: Self::Vector,
    ) -> Self::Vector;
}

/// What functions need of lanes of f64: making powers of 2, and splitting off the exponent.
pub trait Doubles: Simd<Real = f64> {
    /// Turns the integer in the low bits of `m` into a power of 2, by shifting it to the place of the biased exponent.
    fn power(self, m: Self::Vector) -> Self::Vector;
    /// Returns `(k, m)` with `x = m·2^k` and m in [√½, √2), for x positive, finite and normal. The
    /// result of any other x is unspecified.
    fn split(self, x: Self::Vector) -> (Self::Vector, Self::Vector);
}

/// The part of an `impl Simd` that is the same for lanes of f64 on every set: widening and narrowing return their argument.
macro_rules! f64_lanes {
    ($vector:ty) => {
        #[inline(always)]
        fn widen(self, v: $vector) -> [$vector; 1] {
            [v]
        }
        #[inline(always)]
        fn narrow(self, [v]: [$vector; 1]) -> $vector {
            v
        }
    };
}
use f64_lanes;

/// Returns the bits of register `i` from a mask of a block's lanes.
#[inline(always)]
pub fn lanes_of<S: Simd>(mask: u64, i: usize) -> u32 {
    (mask >> (i * S::LANES)) as u32 & ((1u64 << S::LANES) - 1) as u32
}

/// Returns a mask of the first `n` lanes of a block, `n < 64`.
#[inline(always)]
pub fn first_lanes(n: usize) -> u64 {
    (1u64 << n) - 1
}

/// Returns a mask of the first `n` lanes of a register, or of all if it has no more than `n`.
#[inline(always)]
pub fn up_to<S: Simd>(n: usize) -> u32 {
    ((1u64 << n.min(S::LANES)) - 1) as u32
}

/// Returns a mask of all lanes of a block.
#[inline(always)]
pub fn all_lanes<S: Simd>() -> u64 {
    !0 >> (64 - S::BLOCK)
}

/// The bits of √½, for [`Doubles::split`].
const SQRT_HALF: u64 = std::f64::consts::FRAC_1_SQRT_2.to_bits();
/// The bits of 1, whose biased exponent is the bias.
const ONE: u64 = 1.0f64.to_bits();
/// The bits of sign and exponent.
const EXPONENT: u64 = 0xFFF << 52;
/// The bits of 2^52. Or'ed with an integer below 2^52, they are the bits of 2^52 plus that integer.
const TWO_52: u64 = 4_503_599_627_370_496.0f64.to_bits();
const TWO_52_AND_BIAS: f64 = 4_503_599_627_370_496.0 + 1023.0;

/// Loads the values whose bit is set among the lowest `N` of `lanes` and sets the others to `fill`,
/// for sets without a masked load of that width. The loop over single values is not unrolled, since
/// tails are short.
///
/// # Safety
/// `p` is aligned to `T`. For every set bit `i` below `N`, `p + i` is valid for reads.
#[inline(always)]
unsafe fn read_lanes<T: Copy, const N: usize>(p: *const T, lanes: u32, fill: T) -> [T; N] {
    let all = (1 << N) - 1;
    if lanes & all == all {
        // SAFETY: all `N` bits are set, so `p` is aligned and valid for `N` reads (# Safety).
        return unsafe { *p.cast() };
    }
    let mut values = [fill; N];
    let mut rest = lanes & all;
    while rest != 0 {
        let i = rest.trailing_zeros() as usize;
        // SAFETY: `i < N` is a set bit of `lanes`, so `p + i` is valid for a read (# Safety).
        values[i] = unsafe { *p.add(i) };
        rest &= rest - 1;
    }
    values
}

/// Stores the values whose bit is set among the lowest `N` of `lanes`, one by one.
///
/// # Safety
/// `p` is aligned to `T`. For every set bit `i` below `N`, `p + i` is valid for writes.
#[inline(always)]
unsafe fn write_lanes<T: Copy, const N: usize>(p: *mut T, lanes: u32, values: [T; N]) {
    let mut rest = lanes & ((1 << N) - 1);
    while rest != 0 {
        let i = rest.trailing_zeros() as usize;
        // SAFETY: `i < N` is a set bit of `lanes`, so `p + i` is valid for a write (# Safety).
        unsafe { *p.add(i) = values[i] };
        rest &= rest - 1;
    }
}
