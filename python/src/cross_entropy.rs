//! Cross-entropy over stored logits.

use crate::exception;
use crate::layout::Layout;
use crate::problem::{
    Beside, Numbers, Operand, Operands, Targets, class_axis, grad_output, row_sizes,
};
use crate::tensor::{Dtype, Tensor, torch};
use crate::threads::compute;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use smallvec::{SmallVec, smallvec};
use xent::Results;

/// The losses of a call, as the tensor that its caller gets.
pub struct Losses<'py> {
    dtype: Dtype,
    /// Row losses, or nothing yet.
    rows: Option<Operand<'py>>,
    /// The reduced loss.
    pub loss: f64,
    /// f64 `[positions]`
    pub lse: Option<Tensor<'py>>,
}

impl<'py> Losses<'py> {
    /// Room for the results. `dtype` is a `torch.dtype`, or None for that of the logits.
    pub fn new(
        py: Python<'py>,
        logits: &Tensor<'py>,
        rows: &[i64],
        layout: &Layout,
        numbers: &Numbers,
        dtype: Option<&Bound<'py, PyAny>>,
        wants_lse: bool,
    ) -> PyResult<Self> {
        let dtype = match dtype {
            None if !logits.dtype.is_float() => {
                return Err(PyValueError::new_err("input must be a floating-point tensor"));
            }
            None => Some(logits.dtype),
            Some(object) => torch(py)?.dtype(object),
        };
        let Some(dtype) = dtype.filter(|dtype| dtype.is_float()) else {
            return Err(PyValueError::new_err("loss_dtype must be a floating-point dtype"));
        };
        let rows = if numbers.is_reduced() {
            None
        } else {
            let stored = if dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
            Some(Operand::rows(Tensor::empty(py, rows, stored)?, layout)?)
        };
        let wants_lse = wants_lse && !numbers.is_log_probs();
        let positions = layout.positions();
        let lse = wants_lse.then(|| Tensor::empty(py, &[positions as i64], Dtype::F64));
        Ok(Losses { dtype, rows, loss: 0.0, lse: lse.transpose()? })
    }

    /// Where the call writes them.
    pub fn results(&mut self, layout: &Layout) -> PyResult<Results<'_>> {
        let mut results = Results::default();
        match &self.rows {
            None => results.loss = Some(&mut self.loss),
            Some(rows) => results.row_losses = Some(rows.tensor.output(rows.strides)),
        }
        if let Some(lse) = &mut self.lse {
            results.lse = lse.doubles_mut(layout.positions());
        }
        Ok(results)
    }

    /// The tensor of the loss, or of the row losses.
    pub fn tensor(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match &self.rows {
            None => Tensor::scalar(py, self.loss, self.dtype),
            Some(rows) if rows.tensor.dtype == self.dtype => Ok(rows.tensor.object.clone()),
            Some(rows) => rows.tensor.to(self.dtype),
        }
    }
}

/// The layout of logits, and of the other tensors with a class axis.
pub fn layout(
    class_axis: usize,
    logits: &Tensor<'_>,
    targets: Option<&Targets<'_>>,
    gradient: Option<&Tensor<'_>>,
) -> Layout {
    let full = targets.and_then(Targets::full);
    let mut strides: SmallVec<[&[i64]; 3]> = smallvec![&logits.strides[..]];
    strides.extend(full.into_iter().chain(gradient).map(|tensor| &tensor.strides[..]));
    Layout::of(&logits.sizes, class_axis, &strides)
}

/// A loss, and what its backward needs: the gradient, or lse.
type LossAndSaved<'py> = (Bound<'py, PyAny>, Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>);

/// Computes the loss of logits, and with it their gradient or lse. With `in_place` the gradient replaces the logits, if
/// they have strides that xent can use.
#[pyfunction]
pub fn cross_entropy<'py>(
    py: Python<'py>,
    input: &Bound<'py, PyAny>,
    beside: Beside<'py>,
    numbers: &Numbers,
    dtype: Option<&Bound<'py, PyAny>>,
    wants_gradient: bool,
    in_place: bool,
    wants_lse: bool,
) -> PyResult<LossAndSaved<'py>> {
    let logits = Tensor::read("input", input)?;
    let axis = class_axis("input", &logits.sizes)?;
    let targets = Targets::read(&logits.sizes, &beside)?;
    let new = wants_gradient && !in_place;
    let gradient = new.then(|| logits.empty_like()).transpose()?;
    let layout = layout(axis, &logits, targets.as_ref(), gradient.as_ref());
    let work = layout.elements();
    let operands = Operands::read(py, &logits.sizes, &layout, work, targets, &beside)?;
    let rows = row_sizes(&logits.sizes, axis);
    let mut losses = Losses::new(py, &logits, &rows, &layout, numbers, dtype, wants_lse)?;
    let logits = Operand::full(logits, &layout)?;
    let problem = operands.problem(&layout, numbers);
    let targets = operands.targets()?;

    if !wants_gradient {
        let (results, input) = (losses.results(&layout)?, logits.input());
        compute(py, work, || problem.forward_with(input, targets, results)).map_err(exception)?;
        return Ok((losses.tensor(py)?, None, losses.lse.map(|lse| lse.object)));
    }
    // A copy of the logits is nobody else's: its memory serves for the gradient.
    let gradient = match gradient.filter(|_| !logits.is_copy) {
        None => {
            let (results, both) = (losses.results(&layout)?, logits.tensor.output(logits.strides));
            compute(py, work, || problem.forward_backward_in_place_with(both, targets, results))
                .map_err(exception)?;
            logits.tensor.object.clone()
        }
        Some(gradient) => {
            let gradient = Operand::full(gradient, &layout)?;
            let (results, input) = (losses.results(&layout)?, logits.input());
            let output = gradient.tensor.output(gradient.strides);
            compute(py, work, || problem.forward_backward_with(input, targets, output, results))
                .map_err(exception)?;
            gradient.tensor.object
        }
    };
    Ok((losses.tensor(py)?, Some(gradient), losses.lse.map(|lse| lse.object)))
}

/// The operands of a backward that starts from lse.
struct Backward<'py> {
    layout: Layout,
    logits: Operand<'py>,
    operands: Operands<'py>,
    grad_output: Operand<'py>,
    lse: Option<Tensor<'py>>,
    numbers: &'py Numbers,
    /// Where the gradient goes: of the shape and layout of the logits, or of the targets.
    gradient: Option<Tensor<'py>>,
}

/// What a backward computes the gradient of.
#[derive(PartialEq, Eq)]
enum Of {
    Logits,
    /// The gradient replaces the logits.
    LogitsInPlace,
    Targets,
}

impl<'py> Backward<'py> {
    fn read(
        py: Python<'py>,
        grad: &Bound<'py, PyAny>,
        input: &Bound<'py, PyAny>,
        beside: &Beside<'py>,
        numbers: &'py Numbers,
        lse: Option<&Bound<'py, PyAny>>,
        of: Of,
    ) -> PyResult<Self> {
        let logits = Tensor::read("input", input)?;
        let axis = class_axis("input", &logits.sizes)?;
        let targets = Targets::read(&logits.sizes, beside)?;
        let gradient = match of {
            Of::Logits => Some(logits.empty_like()?),
            Of::LogitsInPlace => None,
            Of::Targets => match targets.as_ref().and_then(Targets::full) {
                Some(target) if !numbers.is_teacher() => Some(target.empty_like()?),
                _ => return Err(PyValueError::new_err("these targets have no gradient")),
            },
        };
        let layout = layout(axis, &logits, targets.as_ref(), gradient.as_ref());
        let (sizes, work) = (&logits.sizes, layout.elements());
        let operands = Operands::read(py, sizes, &layout, work, targets, beside)?;
        let rows = row_sizes(sizes, axis);
        let grad_output = grad_output(grad, &rows, &layout, numbers.is_reduced())?;
        let lse = lse.map(|lse| Tensor::read("lse", lse)).transpose()?;
        let logits = Operand::full(logits, &layout)?;
        Ok(Backward { layout, logits, operands, grad_output, lse, numbers, gradient })
    }

    fn lse(&self) -> PyResult<&[f64]> {
        let positions = self.layout.positions();
        match &self.lse {
            None if self.numbers.is_log_probs() => Ok(&[]),
            None => Err(PyValueError::new_err("lse is missing")),
            Some(lse) => lse.doubles(positions).ok_or_else(|| {
                PyValueError::new_err(format!("lse must be float64, packed, [{positions}]"))
            }),
        }
    }
}

/// Computes the gradient of the logits from lse.
#[pyfunction]
pub fn cross_entropy_backward<'py>(
    py: Python<'py>,
    grad_output: &Bound<'py, PyAny>,
    input: &Bound<'py, PyAny>,
    beside: Beside<'py>,
    numbers: &'py Numbers,
    lse: Option<&Bound<'py, PyAny>>,
    in_place: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let mut call = Backward::read(
        py,
        grad_output,
        input,
        &beside,
        numbers,
        lse,
        if in_place { Of::LogitsInPlace } else { Of::Logits },
    )?;
    let gradient = call.gradient.take().filter(|_| !call.logits.is_copy);
    let problem = call.operands.problem(&call.layout, call.numbers);
    let problem = problem.grad_output(call.grad_output.input());
    let (logits, targets, lse) = (&call.logits, call.operands.targets()?, call.lse()?);
    let Some(gradient) = gradient else {
        let both = logits.tensor.output(logits.strides);
        compute(py, call.layout.elements(), || problem.backward_in_place(both, targets, lse))
            .map_err(exception)?;
        return Ok(logits.tensor.object.clone());
    };
    let gradient = Operand::full(gradient, &call.layout)?;
    let (input, output) = (logits.input(), gradient.tensor.output(gradient.strides));
    compute(py, call.layout.elements(), || problem.backward(input, targets, lse, output))
        .map_err(exception)?;
    Ok(gradient.tensor.object)
}

/// Computes the gradient of probability targets from lse.
#[pyfunction]
pub fn target_backward<'py>(
    py: Python<'py>,
    grad_output: &Bound<'py, PyAny>,
    input: &Bound<'py, PyAny>,
    beside: Beside<'py>,
    numbers: &'py Numbers,
    lse: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let mut call = Backward::read(py, grad_output, input, &beside, numbers, lse, Of::Targets)?;
    let gradient = call.gradient.take().expect("there is one of the targets");
    let gradient = Operand::full(gradient, &call.layout)?;
    let problem = call.operands.problem(&call.layout, call.numbers);
    let problem = problem.grad_output(call.grad_output.input());
    let (targets, lse) = (call.operands.targets()?, call.lse()?);
    let (input, output) = (call.logits.input(), gradient.tensor.output(gradient.strides));
    compute(py, call.layout.elements(), || problem.backward_targets(input, targets, lse, output))
        .map_err(exception)?;
    Ok(gradient.tensor.object)
}
