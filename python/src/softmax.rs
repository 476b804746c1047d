//! Softmax and log-softmax over any axis.

use crate::exception;
use crate::layout::Layout;
use crate::problem::Operand;
use crate::tensor::Tensor;
use crate::threads::threads;
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use xent::{Output, Softmax};

/// The layout of a tensor whose softmax runs over the axis `dim`, which counts from the end if it is negative. A tensor
/// without axes has one class.
fn layout(tensor: &mut Tensor<'_>, dim: i64) -> PyResult<Layout> {
    if tensor.sizes.is_empty() {
        (tensor.sizes, tensor.strides) = (vec![1], vec![1]);
    }
    let axes = tensor.sizes.len() as i64;
    if !(-axes..axes).contains(&dim) {
        return Err(PyIndexError::new_err(format!("dim = {dim} is outside [{}, {axes})", -axes)));
    }
    Ok(Layout::of(&tensor.sizes, &tensor.strides, dim.rem_euclid(axes) as usize))
}

/// Softmax, or log-softmax, over an axis.
#[pyfunction]
pub fn softmax<'py>(
    py: Python<'py>,
    input: &Bound<'py, PyAny>,
    dim: i64,
    log: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let mut input = Tensor::read("input", input)?;
    let layout = layout(&mut input, dim)?;
    if !input.dtype.is_float() {
        return Err(PyValueError::new_err("input must be a floating-point tensor"));
    }
    if layout.elements() == 0 {
        return Ok(input.empty_like()?.object);
    }
    let threads = threads(py, layout.elements())?;
    let mut call = Softmax::new(layout.rows, layout.classes).inner(layout.inner);
    call = call.threads(threads.count);
    if let Some(pool) = &threads.pool {
        call = call.pool(&**pool);
    }
    let scalar = input.object.getattr("ndim")?.extract::<i64>()? == 0;
    let input = Operand::full(input, &layout)?;
    // A copy of the input is nobody else's: the result replaces it.
    if input.is_copy {
        let both = input.tensor.output(input.strides);
        py.detach(
            || if log { call.log_softmax_in_place(both) } else { call.softmax_in_place(both) },
        )
        .map_err(exception)?;
        return Ok(input.tensor.object);
    }
    let mut result = input.tensor.empty_like()?;
    if scalar {
        (result.sizes, result.strides) = (vec![1], vec![1]);
    }
    let result = Operand::full(result, &layout)?;
    let (x, y) = (input.input(), result.tensor.output(result.strides));
    py.detach(|| if log { call.log_softmax(x, y) } else { call.softmax(x, y) })
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
    let mut y = Tensor::read("output", output)?;
    let mut grad = Tensor::read("grad_output", grad_output)?;
    if grad.sizes != y.sizes {
        return Err(PyValueError::new_err(format!(
            "grad_output has the shape {}, and output has the shape {}",
            grad.shape(),
            y.shape()
        )));
    }
    let scalar = y.sizes.is_empty();
    let layout = layout(&mut y, dim)?;
    if layout.elements() == 0 {
        return Ok(y.empty_like()?.object);
    }
    let threads = threads(py, layout.elements())?;
    let mut call = Softmax::new(layout.rows, layout.classes).inner(layout.inner);
    call = call.threads(threads.count);
    if let Some(pool) = &threads.pool {
        call = call.pool(&**pool);
    }
    let mut result = y.empty_like()?;
    if scalar {
        (grad.sizes, grad.strides) = (vec![1], vec![1]);
        (result.sizes, result.strides) = (vec![1], vec![1]);
    }
    let (y, grad) = (Operand::full(y, &layout)?, Operand::full(grad, &layout)?);
    let result = Operand::full(result, &layout)?;
    let (y, grad): (xent::Input<'_>, xent::Input<'_>) = (y.input(), grad.input());
    let to: Output<'_> = result.tensor.output(result.strides);
    py.detach(|| {
        if log {
            call.log_softmax_backward(y, grad, to)
        } else {
            call.softmax_backward(y, grad, to)
        }
    })
    .map_err(exception)?;
    Ok(result.tensor.object)
}
