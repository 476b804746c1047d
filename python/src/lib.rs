//! The compiled part of the Python package xent-torch: xent's calls over PyTorch's tensors.
//!
//! It knows tensors by DLPack's C interface, or by their Python methods alone, so that it depends on no C++ interface of
//! PyTorch. It uses xent's Rust surface, whose errors and panics become exceptions without codes in between. The
//! functions take whole tensors, not addresses: what they read and write lies within tensors that they have looked at.

#![allow(clippy::too_many_arguments, reason = "the operands and the options of a loss")]

mod cross_entropy;
mod dlpack;
mod evaluate;
mod layout;
mod linear;
mod problem;
mod softmax;
mod tensor;
mod threads;

use pyo3::exceptions::{PyIndexError, PyMemoryError, PyValueError};
use pyo3::prelude::*;
use xent::Error;

/// The exception that an error of the library becomes, with the library's message.
fn exception(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Target { .. } => PyIndexError::new_err(message),
        Error::Memory { .. } => PyMemoryError::new_err(message),
        _ => PyValueError::new_err(message),
    }
}

#[pymodule]
fn _xent(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<problem::Numbers>()?;
    module.add_function(wrap_pyfunction!(cross_entropy::cross_entropy, module)?)?;
    module.add_function(wrap_pyfunction!(cross_entropy::cross_entropy_backward, module)?)?;
    module.add_function(wrap_pyfunction!(cross_entropy::target_backward, module)?)?;
    module.add_function(wrap_pyfunction!(evaluate::evaluate, module)?)?;
    module.add_function(wrap_pyfunction!(linear::linear_cross_entropy, module)?)?;
    module.add_function(wrap_pyfunction!(linear::linear_cross_entropy_backward, module)?)?;
    module.add_function(wrap_pyfunction!(linear::linear_evaluate, module)?)?;
    module.add_function(wrap_pyfunction!(softmax::softmax, module)?)?;
    module.add_function(wrap_pyfunction!(softmax::softmax_backward, module)?)?;
    Ok(())
}
