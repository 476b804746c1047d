//! Transposes: distributions of any strides into a tile, and a tile back to where its gradient goes.

use super::tile::Tile;
use crate::element::Element;
use crate::simd::{Real, Simd, up_to};
use crate::strategy::TILE_CLASSES;
use std::mem::MaybeUninit;

/// Distributions that are converted together: a multiple of every set's lanes.
const BLOCK: usize = 16;

/// Brings elements of type `E` into a tile: the distributions are `strides[0]` elements apart, their
/// classes `strides[1]`.
///
/// # Safety
/// The tile's classes of its distributions are readable from `from` on by those strides, the tile is
/// writable and apart from them. It has at most TILE_CLASSES classes and TILE distributions, or a single
/// distribution. The processor has the set of `s`.
#[inline(always)]
pub unsafe fn gather<S: Simd, E: Element<S>>(
    s: S,
    tile: &Tile,
    from: *const u8,
    [step, pitch]: [isize; 2],
) {
    let (from, to) = (from.cast::<E>(), tile.x.cast::<S::Real>());
    if step == 1 {
        for c in 0..tile.classes {
            for at in (0..tile.lanes).step_by(S::LANES) {
                let lanes = up_to::<S>(tile.lanes - at);
                let p = from.wrapping_offset(c as isize * pitch).wrapping_add(at);
                // SAFETY: `lanes` has bits for distributions of the tile alone, which are readable from
                // `from` on and have room in the tile (# Safety).
                unsafe {
                    let v = E::load_lanes(s, p, lanes, S::Real::ZERO);
                    s.store_lanes(to.wrapping_add(c * tile.pitch + at), lanes, v);
                }
            }
        }
        return;
    }
    let chunk = size_of::<S::Rows>() / size_of::<S::Vector>();
    let mut first = 0;
    if pitch == 1 && tile.classes >= chunk {
        first = tile.lanes - tile.lanes % S::LANES;
        let mut buffer = MaybeUninit::<[S::Real; TILE_CLASSES * BLOCK]>::uninit();
        let block = if E::NATIVE { first.max(1) } else { BLOCK };
        for start in (0..first).step_by(block) {
            let lanes = block.min(first - start);
            let from = from.wrapping_offset(start as isize * step);
            let (mut rows, mut apart) = (from.cast::<S::Real>(), step);
            if !E::NATIVE {
                let to = buffer.as_mut_ptr().cast::<S::Real>();
                (rows, apart) = (to, tile.classes as isize);
                // Rows without gaps are converted in one go.
                let (count, len) =
                    if step == apart { (1, lanes * tile.classes) } else { (lanes, tile.classes) };
                for row in 0..count {
                    for at in (0..len).step_by(S::LANES) {
                        let lanes = up_to::<S>(len - at);
                        let p = from.wrapping_offset(row as isize * step).wrapping_add(at);
                        // SAFETY: `lanes` keeps to the classes of a block's rows of the tile, which are readable
                        // (# Safety); the buffer has room for all of them.
                        unsafe {
                            let v = E::load_lanes(s, p, lanes, S::Real::ZERO);
                            s.store_lanes(to.wrapping_add(row * len + at), lanes, v);
                        }
                    }
                }
            }
            let to = to.wrapping_add(start);
            for at in (0..lanes).step_by(S::LANES) {
                for c in (0..tile.classes).step_by(chunk) {
                    // The last chunk may overlap the one before.
                    let c = c.min(tile.classes - chunk);
                    let p = rows.wrapping_offset(at as isize * apart).wrapping_add(c);
                    // SAFETY: `chunk` classes of `S::LANES` rows of the block are readable, in the caller's
                    // memory (# Safety) or in the buffer that was filled above.
                    unsafe {
                        for (i, &v) in s.load_rows(p, apart).as_ref().iter().enumerate() {
                            s.store(to.wrapping_add((c + i) * tile.pitch + at), v);
                        }
                    }
                }
            }
        }
    }
    for lane in first..tile.lanes {
        let p = from.wrapping_offset(lane as isize * step);
        for c in 0..tile.classes {
            // SAFETY: class `c` of distribution `lane` is readable, and has its place in the tile
            // (# Safety).
            unsafe {
                let x = (*p.wrapping_offset(c as isize * pitch)).to_f64();
                *to.wrapping_add(c * tile.pitch + lane) = S::Real::from_f64(x);
            }
        }
    }
}

/// Takes a tile to an output of type `G`, by the strides that [`gather`] has, or adds it to the output.
/// Distributions without a bit in `writes` are left alone.
///
/// # Safety
/// The tile is readable, and its classes of its distributions are writable from `to` on by those strides
/// and apart from the tile, which has at most TILE_CLASSES classes and TILE distributions, or a single
/// distribution. The processor has the set of `s`.
#[inline(always)]
pub unsafe fn scatter<S: Simd, G: Element<S>>(
    s: S,
    tile: &Tile,
    to: *mut u8,
    [step, pitch]: [isize; 2],
    accumulate: bool,
    writes: u64,
) {
    let (from, to) = (tile.x.cast::<S::Real>(), to.cast::<G>());
    if step == 1 {
        for c in 0..tile.classes {
            for at in (0..tile.lanes).step_by(S::LANES) {
                let lanes = (writes >> at) as u32 & up_to::<S>(tile.lanes - at);
                let p = to.wrapping_offset(c as isize * pitch).wrapping_add(at);
                // SAFETY: `lanes` has bits for distributions of the tile alone, which are writable from
                // `to` on (# Safety).
                unsafe {
                    let from = from.wrapping_add(c * tile.pitch + at);
                    let mut v = s.load_lanes(from, lanes, S::Real::ZERO);
                    if accumulate {
                        v = s.add(G::load_lanes(s, p, lanes, S::Real::ZERO), v);
                    }
                    G::store_lanes(s, p, lanes, v);
                }
            }
        }
        return;
    }
    let chunk = size_of::<S::Rows>() / size_of::<S::Vector>();
    let mut first = 0;
    let all = writes.trailing_ones() as usize >= tile.lanes;
    if pitch == 1 && tile.classes >= chunk && all && !accumulate {
        first = tile.lanes - tile.lanes % S::LANES;
        let mut buffer = MaybeUninit::<[S::Real; TILE_CLASSES * BLOCK]>::uninit();
        let block = if G::NATIVE { first.max(1) } else { BLOCK };
        for start in (0..first).step_by(block) {
            let lanes = block.min(first - start);
            let (from, to) = (from.wrapping_add(start), to.wrapping_offset(start as isize * step));
            let (mut rows, mut apart) = (to.cast::<S::Real>(), step);
            if !G::NATIVE {
                (rows, apart) = (buffer.as_mut_ptr().cast::<S::Real>(), tile.classes as isize);
            }
            for at in (0..lanes).step_by(S::LANES) {
                for c in (0..tile.classes).step_by(chunk) {
                    // The last chunk may overlap the one before.
                    let c = c.min(tile.classes - chunk);
                    let p = rows.wrapping_offset(at as isize * apart).wrapping_add(c);
                    // SAFETY: the tile has `chunk` classes from `c` on and `S::LANES` distributions of the block
                    // from `at` on; their places in the output are writable (# Safety), and the buffer has room
                    // for a block.
                    unsafe {
                        let mut v = s.splat_rows(S::Real::ZERO);
                        for (i, v) in v.as_mut().iter_mut().enumerate() {
                            *v = s.load(from.wrapping_add((c + i) * tile.pitch + at));
                        }
                        s.store_rows(p, apart, v);
                    }
                }
            }
            if G::NATIVE {
                continue;
            }
            // Rows without gaps are converted in one go.
            let (count, len) =
                if step == apart { (1, lanes * tile.classes) } else { (lanes, tile.classes) };
            for row in 0..count {
                for at in (0..len).step_by(S::LANES) {
                    let lanes = up_to::<S>(len - at);
                    let p = to.wrapping_offset(row as isize * step).wrapping_add(at);
                    // SAFETY: `lanes` keeps to the classes of a block's rows of the output, which are writable
                    // (# Safety); the loop above has filled the buffer with them.
                    unsafe {
                        let from = rows.wrapping_add(row * len + at);
                        G::store_lanes(s, p, lanes, s.load_lanes(from, lanes, S::Real::ZERO));
                    }
                }
            }
        }
    }
    for lane in (first..tile.lanes).filter(|lane| writes >> lane & 1 == 1) {
        let p = to.wrapping_offset(lane as isize * step);
        for c in 0..tile.classes {
            let p = p.wrapping_offset(c as isize * pitch);
            // SAFETY: class `c` of distribution `lane` is in the tile, and writable at its place in the
            // output (# Safety).
            unsafe {
                let mut v = (*from.wrapping_add(c * tile.pitch + lane)).to_f64();
                if accumulate {
                    v = S::Real::from_f64((*p).to_f64() + v).to_f64();
                }
                *p = G::from_f64(v);
            }
        }
    }
}
