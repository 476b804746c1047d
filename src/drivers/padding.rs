//! The padding between the rows of a gradient.

use crate::plan::Plan;
use crate::view::{ElementType, Position};
use std::ops::Range;

/// Sets what lies between the classes of each of these rows and the next row to 0, if the plan says so.
///
/// # Safety
/// The rows are the plan's, and no other thread writes their padding.
pub unsafe fn clear(plan: &Plan, rows: Range<usize>) {
    let Some(output) = plan.output.filter(|output| output.padding > 0) else { return };
    let size = output.view.dtype.size();
    let (classes, padding) = (plan.shape.classes * size, output.padding * size);
    // No row follows the last: what lies behind it may be anybody's.
    for row in rows.start..rows.end.min(plan.shape.rows - 1) {
        // SAFETY: the output covers this row and the next, and the padding lies between them: validation
        // took the row stride for their distance. The bytes of 0.0 are 0 in every float type.
        unsafe {
            let start = output.view.at(Position { row, inner: 0 }, 0);
            start.add(classes).write_bytes(0, padding);
        }
    }
}
