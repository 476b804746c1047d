//! The gradients of softmax and log-softmax with respect to their input.

use super::scratch::Scratch;
use crate::kernels::Kernels;
use crate::kernels::softmax_gradient::{Pair, Tiles};
use crate::kernels::strided::tile::Tile;
use crate::parallel::{Team, Work};
use crate::plan::{Layout, Shape};
use crate::strategy::{CHUNK, TILE, TILE_CLASSES};
use crate::view::{Axis, FloatType, Position, View};
use std::ops::Range;

/// A validated problem: the three operands have the same shape and type.
#[derive(Clone, Copy, Debug)]
pub struct SoftmaxGradient {
    /// The sizes.
    pub shape: Shape,
    /// How the operands lie.
    pub layout: Layout,
    /// y is the logarithm of a softmax.
    pub log: bool,
    /// The output of the forward.
    pub y: View<FloatType>,
    /// The gradient with respect to it.
    pub g: View<FloatType>,
    /// Where the result goes: apart from both, or exactly one of them.
    pub to: View<FloatType>,
}

/// Computes the gradient. The kernels are those that `Isa::kernels` hands out for the operands' type, so
/// the processor has their instruction set.
pub fn run(problem: &SoftmaxGradient, k: &Kernels, team: &Team) {
    let Shape { rows, classes, inner } = problem.shape;
    let (tasks, lanes) = match problem.layout {
        Layout::Contiguous => (rows * inner, 1),
        Layout::Strided(axis) => (tiles_along(problem, axis) * across(problem, axis), TILE),
    };
    let work = Work {
        len: tasks,
        elements_each: lanes.saturating_mul(classes),
        elements: rows * classes * inner,
    };
    // SAFETY: the rows, or tiles, are the problem's, and each is in one task.
    team.for_tasks(&work, |range| unsafe { some(k, problem, range) }, |()| ());
}

/// Tiles along an axis.
fn tiles_along(problem: &SoftmaxGradient, axis: Axis) -> usize {
    problem.shape.along(axis).div_ceil(TILE)
}

/// Distributions along the other axis.
fn across(problem: &SoftmaxGradient, axis: Axis) -> usize {
    match axis {
        Axis::Rows => problem.shape.inner,
        Axis::Inner => problem.shape.rows,
    }
}

/// Does a range of rows, or of tiles.
///
/// # Safety
/// The range is the problem's, and no other thread accesses its distributions.
unsafe fn some(k: &Kernels, problem: &SoftmaxGradient, range: Range<usize>) {
    for index in range {
        match problem.layout {
            Layout::Contiguous => {
                let Shape { inner, .. } = problem.shape;
                let at = Position { row: index / inner, inner: index % inner };
                // SAFETY: the row is the problem's and this thread's (# Safety).
                unsafe { row(k, problem, at) };
            }
            Layout::Strided(axis) => {
                let (tiles, long) = (tiles_along(problem, axis), problem.shape.along(axis));
                let (outer, start) = (index / tiles, index % tiles * TILE);
                let first = match axis {
                    Axis::Rows => Position { row: start, inner: outer },
                    Axis::Inner => Position { row: outer, inner: start },
                };
                // SAFETY: the distributions are the problem's and this thread's (# Safety).
                unsafe { tile(k, problem, axis, first, TILE.min(long - start)) };
            }
        }
    }
}

/// # Safety
/// The row is the problem's, with contiguous classes, and no other thread accesses it.
unsafe fn row(k: &Kernels, problem: &SoftmaxGradient, at: Position) {
    let SoftmaxGradient { y, g, to, log, .. } = problem;
    let classes = problem.shape.classes;
    let (mut y_buffer, mut g_buffer) = (Scratch::<CHUNK>::new(), Scratch::<CHUNK>::new());
    let converts = !y.dtype.is_lane_type();
    let mut pair = |class: usize| {
        let len = CHUNK.min(classes - class);
        // SAFETY: the operands cover the classes of the row (validation), the buffers have room for CHUNK
        // lanes, and the processor has the set of the kernels.
        unsafe {
            let mut pair = Pair {
                y: y.at(at, class),
                g: g.at(at, class),
                to: to.at(at, class),
                len,
                log: *log,
            };
            if converts {
                (k.native.widen)(pair.y, len, y_buffer.start());
                (k.native.widen)(pair.g, len, g_buffer.start());
                (pair.y, pair.g) = (y_buffer.start(), g_buffer.start());
                pair.to = g_buffer.start();
            }
            pair
        }
    };
    let mut sum = 0.0;
    for class in (0..classes).step_by(CHUNK) {
        // SAFETY: the pair is readable; the processor has the set of the kernels.
        sum += unsafe { (k.lanes.products)(&pair(class)) };
    }
    for class in (0..classes).step_by(CHUNK) {
        let pair = pair(class);
        // SAFETY: the pair is readable; its result goes to the row, this thread's alone (# Safety), or to a
        // buffer. The processor has the set of the kernels.
        unsafe {
            (k.lanes.combine)(&pair, sum);
            if converts {
                (k.lane_to_output.narrow)(pair.to, pair.len, to.at(at, class));
            }
        }
    }
}

/// # Safety
/// The `lanes` distributions along `axis` from `first` on are the problem's, and no other thread accesses
/// them.
unsafe fn tile(k: &Kernels, problem: &SoftmaxGradient, axis: Axis, first: Position, lanes: usize) {
    const LANES: usize = TILE_CLASSES * TILE;
    let SoftmaxGradient { y, g, to, log, .. } = problem;
    let classes = problem.shape.classes;
    let mut y_buffer = Scratch::<LANES>::new();
    let (mut g_buffer, mut to_buffer) = (Scratch::<LANES>::new(), Scratch::<LANES>::new());
    let in_place = |view: &View<FloatType>| {
        view.dtype.is_lane_type() && (view.stride_along(axis) == 1 || lanes == 1)
    };
    let bring = |view: &View<FloatType>, class: usize, buffer: *mut u8| {
        let classes = TILE_CLASSES.min(classes - class);
        // SAFETY: the operand covers the class of the first distribution (validation).
        let from = unsafe { view.at(first, class) };
        let tile = Tile { x: buffer, pitch: TILE, lanes, first: class, classes };
        if in_place(view) {
            return Tile { x: from, pitch: view.strides[1] as usize, ..tile };
        }
        let strides = [view.stride_along(axis), view.strides[1]];
        // SAFETY: the operand covers the tile (validation), for which the buffer has room; the processor has
        // the set of the kernels.
        unsafe { (k.native.gather)(&tile, from, strides) };
        tile
    };
    let mut tiles = |class: usize| {
        let y = bring(y, class, y_buffer.start());
        let g = bring(g, class, g_buffer.start());
        let to = if in_place(to) {
            // SAFETY: the output covers the class of the first distribution (validation).
            Tile { x: unsafe { to.at(first, class) }, pitch: to.strides[1] as usize, ..y }
        } else {
            Tile { x: to_buffer.start(), pitch: TILE, ..y }
        };
        Tiles { y, g, to, log: *log }
    };
    let mut sums = [[0.0; TILE]; 2];
    for class in (0..classes).step_by(TILE_CLASSES) {
        // SAFETY: the tiles are readable; the processor has the set of the kernels.
        unsafe { (k.lanes.tile_products)(&tiles(class), &mut sums) };
    }
    for class in (0..classes).step_by(TILE_CLASSES) {
        let tiles = tiles(class);
        // SAFETY: the tiles are readable; their result goes to the output, this thread's alone (# Safety), or
        // to a buffer. The processor has the set of the kernels.
        unsafe {
            (k.lanes.tile_combine)(&tiles, &sums);
            if !in_place(to) {
                let strides = [to.stride_along(axis), to.strides[1]];
                (k.lane_to_output.scatter)(&tiles.to, to.at(first, class), strides, false, !0);
            }
        }
    }
}
