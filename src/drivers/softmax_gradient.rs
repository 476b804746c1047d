//! The gradients of softmax and log-softmax with respect to their input.

use super::place::Place;
use crate::kernels::Kernels;
use crate::kernels::scratch::Scratch;
use crate::kernels::softmax_gradient::{Pair, Tiles};
use crate::kernels::strided::tile::Tile;
use crate::parallel::{Team, Work};
use crate::plan::{Layout, Shape};
use crate::strategy::{self, CHUNK, TILE, TILE_CLASSES};
use crate::view::{FloatType, Position, View};
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

/// Computes the gradient.
///
/// # Safety
/// Validation has made the problem, whose operands stay valid for the call; `Isa::kernels` has handed out
/// the kernels for the operands' type.
pub unsafe fn run(problem: &SoftmaxGradient, k: &Kernels, team: &Team) {
    let shape = &problem.shape;
    let (len, distributions) = match problem.layout {
        Layout::Contiguous => (shape.distributions(), 1),
        Layout::Strided(axis) => (Place::count(shape, axis), TILE),
    };
    let elements = shape.distributions() * shape.classes;
    let task_len = strategy::task_len(len, distributions.saturating_mul(shape.classes));
    let work = Work { len, task_len, elements };
    // SAFETY: the rows, or tiles, are the problem's, and each is in one task.
    team.for_tasks(&work, |range| unsafe { task(k, problem, range) }, |()| ());
}

/// Does a range of rows, or of tiles.
///
/// # Safety
/// As [`run`]; the range is the problem's, and no other thread accesses its distributions.
unsafe fn task(k: &Kernels, problem: &SoftmaxGradient, range: Range<usize>) {
    for index in range {
        // SAFETY: the distributions are the problem's and this thread's (# Safety).
        unsafe {
            match problem.layout {
                Layout::Contiguous => row(k, problem, problem.shape.position(index)),
                Layout::Strided(axis) => {
                    tile(k, problem, &Place::new(&problem.shape, axis, index));
                }
            }
        }
    }
}

/// # Safety
/// As [`run`]; the row is the problem's, with contiguous classes, and no other thread accesses it.
unsafe fn row(k: &Kernels, problem: &SoftmaxGradient, at: Position) {
    let SoftmaxGradient { y, g, to, log, .. } = problem;
    let classes = problem.shape.classes;
    // Halves alone are converted: to f32.
    let mut buffers = [const { Scratch::<{ CHUNK / 2 }>::new() }; 2];
    let [y_start, g_start] = buffers.each_mut().map(Scratch::start);
    let converts = !y.dtype.is_lane_type();
    let pair = |class: usize| {
        let len = CHUNK.min(classes - class);
        // SAFETY: the operands cover the classes of the row (validation), the buffers have room for CHUNK lanes, and
        // the processor has the set of the kernels (# Safety of `run`).
        unsafe {
            let mut pair = Pair {
                y: y.at(at, class),
                g: g.at(at, class),
                to: to.at(at, class),
                len,
                log: *log,
            };
            if converts {
                (k.native.widen)(pair.y, len, y_start);
                (k.native.widen)(pair.g, len, g_start);
                (pair.y, pair.g, pair.to) = (y_start, g_start, g_start);
            }
            pair
        }
    };
    let mut sum = 0.0;
    for class in (0..classes).step_by(CHUNK) {
        // SAFETY: `pair` has found operands that cover the classes (validation), or copied them; the processor has the
        // set of the kernels (# Safety of `run`).
        sum += unsafe { (k.lanes.products)(&pair(class)) };
    }
    for class in (0..classes).step_by(CHUNK) {
        let pair = pair(class);
        // SAFETY: `pair` has found operands that cover the classes (validation), or copied them; its result goes to the
        // row, this thread's alone (# Safety), or to a buffer. The processor has the set of the kernels (# Safety of
        // `run`).
        unsafe {
            (k.lanes.combine)(&pair, sum);
            if converts {
                (k.converted_to_output.narrow)(pair.to, pair.len, to.at(at, class));
            }
        }
    }
}

/// # Safety
/// As [`run`]; the distributions at the place are the problem's, and no other thread accesses them.
unsafe fn tile(k: &Kernels, problem: &SoftmaxGradient, place: &Place) {
    const LANES: usize = TILE_CLASSES * TILE;
    let SoftmaxGradient { y, g, to, log, .. } = problem;
    let classes = problem.shape.classes;
    let mut buffers = [const { Scratch::<LANES>::new() }; 2];
    let [y_start, g_start] = buffers.each_mut().map(Scratch::start);
    let bring = |view: &View<FloatType>, class: usize, buffer: *mut u8| {
        let classes = TILE_CLASSES.min(classes - class);
        // SAFETY: the operand covers the class of the first distribution (validation).
        let from = unsafe { view.at(place.first, class) };
        let tile = Tile { x: buffer, pitch: TILE, lanes: place.len, first: class, classes };
        if place.is_in_place(view) {
            return Tile { x: from, pitch: view.strides[1] as usize, ..tile };
        }
        // SAFETY: the operand covers the tile (validation), for which the buffer has room; the processor has the set of
        // the kernels (# Safety of `run`).
        unsafe { (k.native.gather)(&tile, from, place.strides(view)) };
        tile
    };
    let tiles = |class: usize| {
        let y = bring(y, class, y_start);
        let g = bring(g, class, g_start);
        let to = if place.is_in_place(to) {
            // SAFETY: the output covers the class of the first distribution (validation).
            Tile { x: unsafe { to.at(place.first, class) }, pitch: to.strides[1] as usize, ..y }
        } else {
            // In place of y's copy, or where that would be.
            Tile { x: y_start, pitch: TILE, ..y }
        };
        Tiles { y, g, to, log: *log }
    };
    let mut sums = [[0.0; TILE]; 2];
    for class in (0..classes).step_by(TILE_CLASSES) {
        // SAFETY: `tiles` has found operands that cover the classes (validation), or copied them; the processor has the
        // set of the kernels (# Safety of `run`).
        unsafe { (k.lanes.tile_products)(&tiles(class), &mut sums) };
    }
    for class in (0..classes).step_by(TILE_CLASSES) {
        let tiles = tiles(class);
        // SAFETY: `tiles` has found operands that cover the classes (validation), or copied them; their result goes to
        // the output, this thread's alone (# Safety), or to a buffer. The processor has the set of the kernels
        // (# Safety of `run`).
        unsafe {
            (k.lanes.tile_combine)(&tiles, &sums);
            if !place.is_in_place(to) {
                let (output, strides) = (to.at(place.first, class), place.strides(to));
                (k.converted_to_output.scatter)(&tiles.to, output, strides, false, !0);
            }
        }
    }
}
