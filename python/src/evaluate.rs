//! Results beside the loss.

use crate::cross_entropy::layout;
use crate::exception;
use crate::layout::Layout;
use crate::problem::{Beside, Numbers, Operand, Operands, Targets, class_axis, row_sizes};
use crate::tensor::{Axes, Dtype, Tensor};
use crate::threads::compute;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use xent::Results;

/// Room for the results of a call: vectors, in the order of the library's packed operands.
pub struct Fields<'py> {
    lse: Option<Tensor<'py>>,
    entropy: Option<Tensor<'py>>,
    argmax: Tensor<'py>,
    top_classes: Option<Tensor<'py>>,
    top_log_probs: Option<Tensor<'py>>,
    target_ranks: Option<Tensor<'py>>,
    kl: Option<Tensor<'py>>,
    /// The classes that the top lists have.
    count: usize,
    positions: usize,
}

/// `(lse, entropy, argmax, top_classes, top_log_probs, target_ranks, kl)`
pub type Evaluation<'py> = (
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
    Bound<'py, PyAny>,
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
);

impl<'py> Fields<'py> {
    /// Room for lists of `count` classes, and for what these targets and logits of this dtype have.
    pub fn new(
        py: Python<'py>,
        layout: &Layout,
        numbers: &Numbers,
        dtype: Dtype,
        count: usize,
        operands: &Operands<'py>,
    ) -> PyResult<Self> {
        if count > layout.classes {
            return Err(PyValueError::new_err(format!(
                "top_k = {count} exceeds the {} classes",
                layout.classes
            )));
        }
        let positions = layout.positions();
        let float = if dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
        let room = |is_wanted: bool, size: usize, dtype| {
            is_wanted.then(|| Tensor::empty(py, &[size as i64], dtype)).transpose()
        };
        let (has_lse, has_lists) = (!numbers.is_log_probs(), count > 0);
        let indices = operands.are_indices();
        Ok(Fields {
            lse: room(has_lse, positions, Dtype::F64)?,
            entropy: room(has_lse, positions, float)?,
            argmax: Tensor::empty(py, &[positions as i64], Dtype::I64)?,
            top_classes: room(has_lists, positions * count, Dtype::I64)?,
            top_log_probs: room(has_lists, positions * count, float)?,
            target_ranks: room(indices == Some(true), positions, Dtype::I64)?,
            kl: room(indices == Some(false), positions, float)?,
            count,
            positions,
        })
    }

    /// Where the call writes them.
    pub fn results(&mut self) -> Results<'_> {
        let (positions, listed) = (self.positions, self.positions * self.count);
        let packed = [0; 3];
        Results {
            lse: self.lse.as_mut().and_then(|of| of.doubles_mut(positions)),
            entropy: self.entropy.as_ref().map(|of| of.output(packed)),
            argmax: self.argmax.integers_mut(positions),
            top_classes: self.top_classes.as_mut().and_then(|of| of.integers_mut(listed)),
            top_log_probs: self.top_log_probs.as_ref().map(|of| of.output(packed)),
            top_count: self.count,
            target_ranks: self.target_ranks.as_mut().and_then(|of| of.integers_mut(positions)),
            kl: self.kl.as_ref().map(|of| of.output(packed)),
            ..Results::default()
        }
    }

    /// The results as tensors of the sizes `rows`, the lists with their class axis.
    pub fn tensors(self, rows: &[i64], layout: &Layout) -> PyResult<Evaluation<'py>> {
        let (class_axis, list_axis) = layout.list_axes();
        let mut lists = Axes::from(rows);
        lists.insert(list_axis, self.count as i64);
        let of_rows = |of: Option<Tensor<'py>>| of.map(|tensor| tensor.view(rows)).transpose();
        let of_lists = |of: Option<Tensor<'py>>| {
            let view = |tensor: Tensor<'py>| {
                tensor.view(&lists)?.call_method1("movedim", (list_axis, class_axis))
            };
            of.map(view).transpose()
        };
        Ok((
            of_rows(self.lse)?,
            of_rows(self.entropy)?,
            self.argmax.view(rows)?,
            of_lists(self.top_classes)?,
            of_lists(self.top_log_probs)?,
            of_rows(self.target_ranks)?,
            of_rows(self.kl)?,
        ))
    }
}

/// Computes lse, entropy and argmax of logits, lists of their `count` largest, and the ranks or divergences of targets.
#[pyfunction]
pub fn evaluate<'py>(
    py: Python<'py>,
    input: &Bound<'py, PyAny>,
    beside: Beside<'py>,
    numbers: &Numbers,
    count: usize,
) -> PyResult<Evaluation<'py>> {
    let logits = Tensor::read("input", input)?;
    let axis = class_axis("input", &logits.sizes)?;
    let targets = Targets::read(&logits.sizes, &beside)?;
    let layout = layout(axis, &logits, targets.as_ref(), None);
    let rows = row_sizes(&logits.sizes, axis);
    let work = layout.elements();
    let operands = Operands::read(py, &logits.sizes, &layout, work, targets, &beside)?;
    let mut fields = Fields::new(py, &layout, numbers, logits.dtype, count, &operands)?;
    let logits = Operand::full(logits, &layout)?;
    let problem = operands.problem(&layout, numbers);
    let (input, results) = (logits.input(), fields.results());
    let done = match operands.are_indices() {
        None => compute(py, work, || problem.evaluate(input, results)),
        Some(_) => {
            let targets = operands.targets()?;
            compute(py, work, || problem.forward_with(input, targets, results))
        }
    };
    done.map_err(exception)?;
    fields.tensors(&rows, &layout)
}
