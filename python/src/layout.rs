//! How a tensor of any number of axes becomes rows, classes and inner positions.
//!
//! xent's operands have three axes. The axes around the class axis are cut into two groups, those that make the rows and
//! those that make the inner positions, and each group must be steppable by one stride. Where a tensor has no such
//! stride, it is copied.

/// The shape of a call, and how the axes of its tensors make it.
#[derive(Clone, Copy)]
pub struct Layout {
    pub rows: usize,
    pub classes: usize,
    pub inner: usize,
    /// The class axis of tensors that have one.
    class_axis: usize,
    /// The axes without the class axis.
    axes: usize,
    /// So many of them make the rows; the others make the inner positions.
    row_axes: usize,
}

impl Layout {
    /// The layout in which tensors with a class axis, of the same sizes, need no copy. If there is none, the one in which
    /// packed copies have strides: that whose cut is at the class axis.
    pub fn of(sizes: &[i64], class_axis: usize, strides: &[&[i64]]) -> Layout {
        let axes = sizes.len() - 1;
        // Rows of contiguous classes are the fastest case of the library: channels-last images are such rows.
        let logits = strides[0];
        let all = (logits[class_axis] == 1 || sizes[class_axis] == 1).then_some(axes);
        let cuts = all.into_iter().chain([class_axis]).chain(0..=axes);
        let mut layouts = cuts.map(|row_axes| Layout::cut(sizes, class_axis, row_axes));
        layouts
            .find(|layout| strides.iter().all(|own| layout.strides(sizes, own).is_some()))
            .unwrap_or_else(|| Layout::cut(sizes, class_axis, class_axis))
    }

    fn cut(sizes: &[i64], class_axis: usize, row_axes: usize) -> Layout {
        let (mut rows, mut inner, mut axis) = (1, 1, 0);
        for (at, &size) in sizes.iter().enumerate() {
            if at != class_axis {
                *(if axis < row_axes { &mut rows } else { &mut inner }) *= size as usize;
                axis += 1;
            }
        }
        let (classes, axes) = (sizes[class_axis] as usize, sizes.len() - 1);
        Layout { rows, classes, inner, class_axis, axes, row_axes }
    }

    /// The layout of tensors of these sizes, which have a list for each position in place of the classes.
    pub fn of_lists(&self, sizes: &[i64]) -> Layout {
        Layout { classes: sizes[self.class_axis] as usize, ..*self }
    }

    /// The class axis, and the axis that a list has where rows, list and inner positions follow one another.
    pub fn list_axes(&self) -> (usize, usize) {
        (self.class_axis, self.row_axes)
    }

    /// The number of softmax distributions.
    pub fn positions(&self) -> usize {
        self.rows * self.inner
    }

    /// The number of logits.
    pub fn elements(&self) -> usize {
        self.positions() * self.classes
    }

    /// The strides of rows, classes and inner positions of a tensor with a class axis. None if there are none, or if
    /// classes or all elements repeat.
    pub fn strides(&self, sizes: &[i64], strides: &[i64]) -> Option<[i64; 3]> {
        let class = strides[self.class_axis];
        if self.elements() == 0 {
            return Some([0; 3]);
        }
        let around = |at: &usize| *at != self.class_axis;
        let [row, inner] = self.group(sizes, strides, (0..sizes.len()).filter(around))?;
        let steps = if self.classes > 1 { class != 0 } else { self.is_stepped(row, inner) };
        steps.then_some([row, class, inner])
    }

    /// The strides of a tensor without a class axis. None if there are none, or if all elements are one: xent takes
    /// strides of 0 alone for packed memory.
    pub fn row_strides(&self, sizes: &[i64], strides: &[i64]) -> Option<[i64; 3]> {
        if self.positions() == 0 {
            return Some([0; 3]);
        }
        let [row, inner] = self.group(sizes, strides, 0..sizes.len())?;
        self.is_stepped(row, inner).then_some([row, 0, inner])
    }

    /// Whether strides lead to more than one address, as far as there is more than one position.
    fn is_stepped(&self, row: i64, inner: i64) -> bool {
        (self.rows > 1 && row != 0) || (self.inner > 1 && inner != 0) || self.positions() == 1
    }

    /// The stride that steps over the axes of the rows, and that of the inner positions; `axes` are those of both.
    fn group(
        &self,
        sizes: &[i64],
        strides: &[i64],
        axes: impl DoubleEndedIterator<Item = usize>,
    ) -> Option<[i64; 2]> {
        // Of each group: the stride, and the stride that the next axis to the left must have.
        let mut groups: [Option<(i64, i64)>; 2] = [None; 2];
        for (at, axis) in (0..self.axes).rev().zip(axes.rev()) {
            let (stride, size) = (strides[axis], sizes[axis]);
            if size == 1 {
                continue;
            }
            let group = &mut groups[usize::from(at >= self.row_axes)];
            *group = match *group {
                None => Some((stride, stride.checked_mul(size)?)),
                Some((step, next)) if next == stride => Some((step, next.checked_mul(size)?)),
                Some(_) => return None,
            };
        }
        Some(groups.map(|group| group.map_or(0, |(step, _)| step)))
    }
}
