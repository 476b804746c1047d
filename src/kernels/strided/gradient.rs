//! The second sweep over a tile: it writes the gradient, or the softmax.

use super::reduce::{Masses, excluded};
use super::tile::{Tile, number, shift_logits, take, take_wide, zip_wide};
use crate::kernels::entropy_bonus;
use crate::kernels::row_math::{
    Coefficients, OutputTerm, ROWS, RowGroup, RowGroupExtras, RowLanes,
};
use crate::math::exp2::{Base, ByExponent, ByLogit, Clamped, Exp2, Unclamped, exponent};
use crate::simd::{ONES, Real, Simd, up_to};

/// What the gradient of a tile is made of.
#[derive(Clone, Copy, Debug)]
pub struct TileGradient<'a> {
    /// Where it goes, in the lanes' own type.
    pub g: *mut u8,
    /// Elements from class to class.
    pub pitch: usize,
    /// The gradient is added to what the memory holds.
    pub accumulate: bool,
    /// What is computed from the logits.
    pub term: OutputTerm,
    /// The rows: their excluded classes, shifts and coefficients.
    pub groups: &'a [RowGroup],
    /// The coefficients have biases: each is multiplied by the mass of a class, and subtracted from it.
    pub has_bias: bool,
    /// See `has_bias`.
    pub masses: Masses,
    /// What the entropy bonus adds to each class, if there is one.
    pub bonus: Option<&'a [RowGroupExtras]>,
    /// The first of two factors, where some row's is extreme: `coefficients` have the second.
    pub first_factors: Option<&'a [RowLanes]>,
    /// Some row's scale is not 1.
    pub has_scale: bool,
    /// Some row is filled with one value.
    pub fills: bool,
    /// What the difference is multiplied by, laid out as the tile; null for 1.
    pub slope: *const u8,
    /// No exponent is above that of the row's largest logit, but for the excluded class's and those of
    /// rows that are filled: the shifts are the rows' own, not those of an lse operand.
    pub bounded: bool,
    /// One bit for each distribution that is written at all.
    pub writes: u64,
}

impl TileGradient<'_> {
    /// Whether exponentials, one factor a row and the entries will do.
    #[inline(always)]
    fn is_fast(&self) -> bool {
        let plain = !(self.has_bias || self.has_scale || self.fills || self.accumulate);
        let none = self.first_factors.is_none() && self.slope.is_null() && self.bonus.is_none();
        plain && none && self.term == OutputTerm::Exponentials
    }

    /// One bit a row, out of the masks of the groups that a register's rows are in.
    ///
    /// # Safety
    /// There are groups for the whole register.
    #[inline(always)]
    unsafe fn bits<S: Simd>(&self, mask: impl Fn(&Coefficients) -> u8, at: usize) -> u32 {
        let (mut bits, mut row) = (0, at / ROWS * ROWS);
        while row < at + S::LANES {
            // SAFETY: there is a group for row `row` (# Safety).
            let group = unsafe { self.groups.get_unchecked(row / ROWS) };
            bits |= u32::from(mask(&group.coefficients)) << (row - at / ROWS * ROWS);
            row += ROWS;
        }
        bits >> (at % ROWS) & up_to::<S>(S::LANES)
    }
}

/// NaN in every lane.
static NANS: [f64; 16] = [f64::NAN; 16];

/// `of` in lanes whose bit is set, 0 elsewhere.
#[inline(always)]
fn where_set<S: Simd>(s: S, of: &'static [f64; 16], bits: u32) -> S::Vector {
    let d = s.wide();
    let wide = <S::Wide as Simd>::LANES;
    let mut v = s.widen(s.splat(S::Real::ZERO));
    for (i, v) in v.as_mut().iter_mut().enumerate() {
        let lanes = bits >> (i * wide) & ((1 << wide) - 1);
        // SAFETY: a register of f64 has at most as many lanes as the array has numbers.
        *v = unsafe { d.load_lanes(of.as_ptr(), lanes, 0.0) };
    }
    s.narrow(v)
}

/// Whether a sweep can do everything that a tile may ask for.
trait TileMode {
    /// It can.
    const GENERAL: bool;
}

struct Fast;
struct General;

impl TileMode for Fast {
    const GENERAL: bool = false;
}
impl TileMode for General {
    const GENERAL: bool = true;
}

/// Writes the gradient of a tile, or adds it to what the memory holds.
///
/// # Safety
/// The tile is readable and has at most TILE_CLASSES classes; masses, slopes and the gradient are there
/// for all its classes and distributions, and groups, and first factors and bonuses if there are any, for
/// whole registers of distributions; the gradient is exactly the tile or apart from it; the processor has the
/// set of `s`.
#[inline(always)]
pub unsafe fn gradient<S: Simd<Real: Base>>(s: S, tile: &Tile, gradient: &TileGradient) {
    // SAFETY: this function's own # Safety.
    unsafe {
        if gradient.is_fast() {
            sweep::<S, Fast>(s, tile, gradient);
        } else {
            sweep::<S, General>(s, tile, gradient);
        }
    }
}

/// # Safety
/// As [`gradient`]; the tile asks for no more than `M` can do.
#[inline(always)]
unsafe fn sweep<S: Simd<Real: Base>, M: TileMode>(s: S, tile: &Tile, gradient: &TileGradient) {
    let zero = s.splat(S::Real::ZERO);
    let d = s.wide();
    let inverse = d.splat(S::Real::INVERSE.0);
    let groups = gradient.groups;
    for at in (0..tile.lanes).step_by(S::LANES) {
        let lanes = up_to::<S>(tile.lanes - at);
        let writes = (gradient.writes >> at) as u32 & lanes;
        if writes == 0 {
            continue;
        }
        let whole = writes == up_to::<S>(S::LANES);
        // SAFETY: there are groups for whole registers (# Safety).
        let (shift_logit, shift_exponent, factor, wide_bias, entry, class) = unsafe {
            (
                shift_logits(s, groups, at),
                take_wide(s, groups, |group| &group.sums.shift_exponent, at),
                take_wide(s, groups, |group| &group.coefficients.factor, at),
                if M::GENERAL && gradient.has_bias {
                    take_wide(s, groups, |group| &group.coefficients.bias, at)
                } else {
                    s.widen(zero)
                },
                take(s, groups, |group| &group.coefficients.entry, at),
                excluded(s, groups, at, tile),
            )
        };
        let logits = s.narrow(shift_logit);
        let exp = Exp2::<S, ByLogit>::lanes(s, logits, s.narrow(shift_exponent));
        let by_exponent = Exp2::<S, ByExponent>::lanes(s, zero, s.narrow(shift_exponent));
        let (narrow_factor, bias) = (s.narrow(factor), s.narrow(wide_bias));
        let uniform_bias = s.sub(zero, bias);
        let bounded = gradient.bounded && s.bits(s.equal(logits, zero)) == up_to::<S>(S::LANES);
        let (mut sweeps, mut fill) = (s.equal(zero, zero), zero);
        if M::GENERAL && gradient.fills {
            // SAFETY: there are groups for whole registers (# Safety).
            let (swept, nan) = unsafe {
                (gradient.bits::<S>(|of| of.sweeps, at), gradient.bits::<S>(|of| of.fills_nan, at))
            };
            sweeps = s.less(zero, where_set(s, &ONES, swept));
            fill = where_set(s, &NANS, nan);
        }
        let bonus = match gradient.bonus {
            // SAFETY: there are bonuses for whole registers (# Safety).
            Some(extras) if M::GENERAL => Some(unsafe {
                let exponent = take(s, extras, |extras| extras.bonus.exponent(), at);
                (
                    Exp2::<S, ByLogit>::lanes(s, logits, exponent),
                    take(s, extras, |extras| extras.bonus.slope(), at),
                    take(s, extras, |extras| extras.bonus.level(), at),
                )
            }),
            _ => None,
        };
        for c in 0..tile.classes {
            // SAFETY: `c` is a class of the tile, which has at most TILE_CLASSES (# Safety).
            let number = unsafe { number(s, c) };
            let (is_excluded, is_other) = (s.equal(number, class), s.not_equal(number, class));
            let p = tile.x.cast::<S::Real>().wrapping_add(c * tile.pitch + at);
            let g = gradient.g.cast::<S::Real>().wrapping_add(c * gradient.pitch + at);
            // SAFETY: a whole register lies within the tile; else the mask has bits for its distributions
            // alone (# Safety).
            let x =
                unsafe { if whole { s.load(p) } else { s.load_lanes(p, lanes, S::Real::ZERO) } };
            let mut minus_bias = uniform_bias;
            if M::GENERAL && gradient.has_bias && !gradient.masses.data.is_null() {
                let mut v = wide_bias;
                for (i, v) in v.as_mut().iter_mut().enumerate() {
                    // SAFETY: there are masses for all classes and whole registers (# Safety).
                    let m = unsafe { gradient.masses.load(s, c, at, i) };
                    // Either may be infinite while the other is 0.
                    let zero = d.splat(0.0);
                    let absent = d.either(d.equal(m, zero), d.equal(*v, zero));
                    *v = d.select(absent, zero, d.mul(*v, m));
                }
                minus_bias = s.sub(zero, s.narrow(v));
            }
            if let Some((exp, slope, level)) = &bonus {
                minus_bias = s.add(minus_bias, entropy_bonus::term(s, exp, x, *slope, *level));
            }
            let scaled = |e: S::Vector| match gradient.first_factors {
                Some(first) if M::GENERAL => {
                    // SAFETY: there are first factors for whole registers (# Safety).
                    s.mul(e, unsafe { take(s, first, |lanes| lanes, at) })
                }
                _ => e,
            };
            let term = if M::GENERAL { gradient.term } else { OutputTerm::Exponentials };
            let mut v = match term {
                OutputTerm::Exponentials => {
                    let e = match bounded {
                        true => by_exponent.value_where::<Unclamped>(x, is_other),
                        false => exp.value::<Clamped>(x),
                    };
                    s.mul_add(scaled(e), narrow_factor, minus_bias)
                }
                OutputTerm::BaseE => s.mul(scaled(exp.base_e(x)), narrow_factor),
                OutputTerm::None => minus_bias,
                OutputTerm::LogSoftmax => {
                    let above = zip_wide::<S>(s.widen(x), shift_logit, |x, logit| d.sub(x, logit));
                    let above = zip_wide::<S>(above, shift_exponent, |x, by| exponent(s, x, by));
                    s.narrow(zip_wide::<S>(above, factor, |x, lse| d.sub(d.mul(x, inverse), lse)))
                }
            };
            if M::GENERAL && gradient.has_scale {
                // SAFETY: there are groups for whole registers (# Safety).
                v = s.mul(v, unsafe { take(s, groups, |group| &group.coefficients.scale, at) });
            }
            if M::GENERAL && !gradient.slope.is_null() {
                let slope = gradient.slope.cast::<S::Real>().wrapping_add(c * tile.pitch + at);
                // SAFETY: slopes are laid out as the tile (# Safety).
                v = s.mul(v, unsafe { s.load_lanes(slope, lanes, S::Real::ZERO) });
            }
            if M::GENERAL && gradient.fills {
                v = s.select(sweeps, v, fill);
            }
            v = s.select(is_excluded, entry, v);
            // SAFETY: the gradient is there for all classes and distributions of the tile (# Safety), and
            // `writes` has bits for distributions alone.
            unsafe {
                if M::GENERAL && gradient.accumulate {
                    v = s.add(s.load_lanes(g, writes, S::Real::ZERO), v);
                }
                if whole {
                    s.store(g, v);
                } else {
                    s.store_lanes(g, writes, v);
                }
            }
        }
    }
}
