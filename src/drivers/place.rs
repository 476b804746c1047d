//! Where the tiles and strips of a problem lie.

use crate::plan::Shape;
use crate::strategy::TILE;
use crate::view::{Axis, ElementType, FloatType, Position, Span, View};

/// Distributions that are neighbours along an axis.
#[derive(Clone, Copy)]
pub struct Place {
    /// The axis.
    pub axis: Axis,
    /// The first distribution.
    pub first: Position,
    /// How many distributions there are.
    pub len: usize,
}

impl Place {
    /// Tile `index` of a shape, below [`count`](Self::count).
    pub fn new(shape: &Shape, axis: Axis, index: usize) -> Self {
        let (along, tiles) = (shape.along(axis), tiles(shape, axis));
        let (outer, start) = (index / tiles, index % tiles * TILE);
        let first = match axis {
            Axis::Rows => Position { row: start, inner: outer },
            Axis::Inner => Position { row: outer, inner: start },
        };
        Place { axis, first, len: TILE.min(along - start) }
    }

    /// The distributions of the tiles from `index` on that are neighbours, up to tile `end`; and how many
    /// tiles these are.
    pub fn run(shape: &Shape, axis: Axis, index: usize, end: usize) -> (Self, usize) {
        let tiles = tiles(shape, axis);
        let place = Place::new(shape, axis, index);
        let start = index % tiles;
        let count = (tiles - start).min(end - index);
        let len = (count * TILE).min(shape.along(axis) - start * TILE);
        (Place { len, ..place }, count)
    }

    /// Distributions `start..start + len` as a place, or as many of them as there are.
    pub fn part(&self, start: usize, len: usize) -> Self {
        let Span { first, axis, len } = self.span(start, len);
        Place { axis, first, len }
    }

    /// The tiles of a shape.
    pub fn count(shape: &Shape, axis: Axis) -> usize {
        let across = match axis {
            Axis::Rows => shape.inner,
            Axis::Inner => shape.rows,
        };
        if shape.along(axis) == 0 { 0 } else { across * tiles(shape, axis) }
    }

    /// The distributions of a span.
    pub fn of(span: &Span) -> Self {
        Place { axis: span.axis, first: span.first, len: span.len }
    }

    /// Distribution `i`.
    pub fn at(&self, i: usize) -> Position {
        Span { first: self.first, axis: self.axis, len: self.len }.at(i)
    }

    /// Distributions `start..start + len`, or as many of them as there are.
    pub fn span(&self, start: usize, len: usize) -> Span {
        Span { first: self.at(start), axis: self.axis, len: len.min(self.len - start) }
    }

    /// The elements of an operand from one distribution to the next, and from class to class.
    pub fn strides<T: ElementType>(&self, view: &View<T>) -> [isize; 2] {
        [view.stride_along(self.axis), view.strides[1]]
    }

    /// Whether kernels read and write an operand where it lies: the distributions are side by side, in the
    /// lanes' own type.
    pub fn is_in_place(&self, view: &View<FloatType>) -> bool {
        (view.stride_along(self.axis) == 1 || self.len == 1) && view.dtype.is_lane_type()
    }
}

/// The tiles along an axis.
fn tiles(shape: &Shape, axis: Axis) -> usize {
    shape.along(axis).div_ceil(TILE).max(1)
}
