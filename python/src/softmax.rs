//! Softmax and log-softmax over any axis.

use crate::exception;
use crate::layout::Layout;
use crate::problem::Operand;
use crate::tensor::Tensor;
use crate::threads::{compute, threads};
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use smallvec::smallvec;
use xent::Softmax;

/// Gives a tensor without axes one of a single class.
fn with_axes(mut tensor: Tensor<'_>) -> Tensor<'_> {
    if tensor.sizes.is_empty() {
        (tensor.sizes, tensor.strides) = (smallvec![1], smallvec![1]);
    }
    tensor
}

/// The layout of tensors of the same sizes, of which the softmax runs over the axis `dim`. It counts from the end if it
/// is negative.
fn layout(tensors: &[&Tensor<'_>], dim: i64) -> PyResult<Layout> {
    let sizes = &tensors[0].sizes;
    let axes = sizes.len() as i64;
    if !(-axes..axes).contains(&dim) {
        return Err(PyIndexError::new_err(format!("dim = {dim} is outside [{}, {axes})", -axes)));
    }
    let strides: Vec<&[i64]> = tensors.iter().map(|tensor| &tensor.strides[..]).collect();
    Ok(Layout::of(sizes, dim.rem_euclid(axes) as usize, &strides))
}

/// Calls `run` with the call of a layout, on as many threads as torch uses.
fn call<T>(py: Python<'_>, layout: &Layout, run: impl FnOnce(Softmax<'_>) -> T) -> PyResult<T> {
    let threads = threads(py, layout.elements())?;
    let call = Softmax::new(layout.rows, layout.classes).inner(layout.inner);
    let call = call.threads(threads.count);
    Ok(run(match &threads.pool {
        None => call,
        Some(pool) => call.pool(&**pool),
    }))
}

/// Softmax, or log-softmax, over an axis.
#[pyfunction]
pub fn softmax<'py>(
    py: Python<'py>,
    input: &Bound<'py, PyAny>,
    dim: i64,
    log: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let input = with_axes(Tensor::read("input", input)?);
    if !input.dtype.is_float() {
        return Err(PyValueError::new_err("input must be a floating-point tensor"));
    }
    let result = with_axes(input.empty_like()?);
    let layout = layout(&[&input, &result], dim)?;
    if layout.elements() == 0 {
        return Ok(result.object);
    }
    let (input, result) = (Operand::full(input, &layout)?, Operand::full(result, &layout)?);
    let (x, y) = (input.input(), result.tensor.output(result.strides));
    call(py, &layout, |call| {
        compute(py, layout.elements(), || {
            if log { call.log_softmax(x, y) } else { call.softmax(x, y) }
        })
    })?
    .map_err(exception)?;
    Ok(result.tensor.object)
}

/// The gradient through softmax, or log-softmax, from its output.
#[pyfunction]
pub fn softmax_backward<'py>(
    py: Python<'py>,
    grad_output: &Bound<'py, PyAny>,
    output: &Bound<'py, PyAny>,
    dim: i64,
    log: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let y = with_axes(Tensor::read("output", output)?);
    let grad = with_axes(Tensor::read("grad_output", grad_output)?);
    if grad.sizes != y.sizes {
        return Err(PyValueError::new_err(format!(
            "grad_output has the shape {}, and output has the shape {}",
            grad.shape(),
            y.shape()
        )));
    }
    let result = with_axes(y.empty_like()?);
    let layout = layout(&[&y, &grad, &result], dim)?;
    if layout.elements() == 0 {
        return Ok(result.object);
    }
    let (y, grad) = (Operand::full(y, &layout)?, Operand::full(grad, &layout)?);
    let result = Operand::full(result, &layout)?;
    let (y, grad, to) = (y.input(), grad.input(), result.tensor.output(result.strides));
    call(py, &layout, |call| {
        compute(py, layout.elements(), || match log {
            true => call.log_softmax_backward(y, grad, to),
            false => call.softmax_backward(y, grad, to),
        })
    })?
    .map_err(exception)?;
    Ok(result.tensor.object)
}
