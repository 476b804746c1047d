//! Cross-entropy of a linear layer whose logits are never stored.

use crate::cross_entropy::Losses;
use crate::evaluate::{Evaluation, Fields};
use crate::exception;
use crate::layout::Layout;
use crate::problem::{Beside, Numbers, Operands, Targets, grad_output, vector};
use crate::tensor::{Dtype, Tensor};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use xent::{Linear, LinearGrads};

/// A matrix whose features follow one another, copied if they do not.
struct Matrix<'py> {
    tensor: Tensor<'py>,
    strides: [i64; 3],
}

impl<'py> Matrix<'py> {
    fn read(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let mut tensor = Tensor::read(name, object)?;
        let &[rows, features] = &tensor.sizes[..] else {
            let shape = tensor.shape();
            return Err(PyValueError::new_err(format!(
                "{name} has the shape {shape}, not two axes"
            )));
        };
        // Rows that repeat may lie at one address, but strides of 0 alone stand for packed memory.
        let is_packed = features <= 1 || tensor.strides[1] == 1;
        let is_stepped = rows <= 1 || features > 1 || tensor.strides[0] != 0;
        if !(is_packed && is_stepped) {
            tensor = tensor.packed()?;
        }
        let strides = [tensor.strides[0], 1, 0];
        Ok(Matrix { tensor, strides })
    }

    fn size(&self, axis: usize) -> usize {
        self.tensor.sizes[axis] as usize
    }

    /// A matrix for the gradient. That of f16 is f32: a later factor, such as that of loss scaling, brings back what
    /// f16 would have lost.
    fn gradient(&self, py: Python<'py>) -> PyResult<Self> {
        let dtype = if self.tensor.dtype == Dtype::F16 { Dtype::F32 } else { self.tensor.dtype };
        let tensor = Tensor::empty(py, &self.tensor.sizes, dtype)?;
        let strides = [tensor.strides[0], 1, 0];
        Ok(Matrix { tensor, strides })
    }
}

/// The layer and everything beside it.
struct Layer<'py> {
    layout: Layout,
    input: Matrix<'py>,
    weight: Matrix<'py>,
    bias: Option<Tensor<'py>>,
    operands: Operands<'py>,
    workspace: usize,
}

/// A gradient for each of input, linear weight and linear bias.
type Gradients<'py> = [Option<Bound<'py, PyAny>>; 3];

impl<'py> Layer<'py> {
    fn read(
        py: Python<'py>,
        input: &Bound<'py, PyAny>,
        linear_weight: &Bound<'py, PyAny>,
        linear_bias: Option<&Bound<'py, PyAny>>,
        beside: &Beside<'py>,
        workspace: usize,
    ) -> PyResult<Self> {
        let input = Matrix::read("input", input)?;
        let layer = Matrix::read("linear_weight", linear_weight)?;
        let (features, classes) = (input.size(1), layer.size(0));
        if layer.size(1) != features {
            return Err(PyValueError::new_err(format!(
                "input has {features} features, and linear_weight has {}",
                layer.size(1)
            )));
        }
        let bias = linear_bias.map(|bias| vector("linear_bias", bias, classes)).transpose()?;
        let logits = [input.tensor.sizes[0], classes as i64];
        let targets = Targets::read(&logits, beside)?;
        let layout = Layout::of(&logits, 1, &[&[classes as i64, 1]]);
        let work = layout.elements().saturating_mul(features.max(1));
        let operands = Operands::read(py, &logits, &layout, work, targets, beside)?;
        Ok(Layer { layout, input, weight: layer, bias, operands, workspace })
    }

    fn rows(&self) -> [i64; 1] {
        [self.layout.rows as i64]
    }

    fn linear<'a>(&'a self, problem: xent::CrossEntropy<'a>) -> Linear<'a> {
        let linear = Linear::new(problem, self.input.size(1)).workspace(self.workspace);
        match &self.bias {
            None => linear,
            Some(bias) => linear.bias(bias.input([0; 3])),
        }
    }

    /// Room for the gradients of input, weight and bias that are wanted.
    fn gradients(&self, py: Python<'py>, wanted: [bool; 3]) -> PyResult<Wanted<'py>> {
        let bias = self.bias.as_ref().filter(|_| wanted[2]);
        Ok(Wanted {
            input: wanted[0].then(|| self.input.gradient(py)).transpose()?,
            weight: wanted[1].then(|| self.weight.gradient(py)).transpose()?,
            bias: bias.map(|bias| Tensor::empty(py, &bias.sizes, bias.dtype)).transpose()?,
        })
    }
}

/// The gradients that a call writes.
struct Wanted<'py> {
    input: Option<Matrix<'py>>,
    weight: Option<Matrix<'py>>,
    bias: Option<Tensor<'py>>,
}

impl<'py> Wanted<'py> {
    fn grads(&self) -> LinearGrads<'_> {
        LinearGrads {
            hidden: self.input.as_ref().map(|of| of.tensor.output(of.strides)),
            weight: self.weight.as_ref().map(|of| of.tensor.output(of.strides)),
            bias: self.bias.as_ref().map(|bias| bias.output([0; 3])),
        }
    }

    fn objects(self) -> Gradients<'py> {
        let matrix = |of: Matrix<'py>| of.tensor.object;
        [self.input.map(matrix), self.weight.map(matrix), self.bias.map(|bias| bias.object)]
    }
}

/// Computes the loss of a layer's logits, and with it the gradients that are wanted, of input, linear weight and linear
/// bias, or lse. Gradients of f16 matrices are f32.
#[pyfunction]
pub fn linear_cross_entropy<'py>(
    py: Python<'py>,
    input: &Bound<'py, PyAny>,
    linear_weight: &Bound<'py, PyAny>,
    linear_bias: Option<&Bound<'py, PyAny>>,
    beside: Beside<'py>,
    numbers: &Numbers,
    workspace: usize,
    dtype: Option<&Bound<'py, PyAny>>,
    wanted: [bool; 3],
    wants_lse: bool,
) -> PyResult<(Bound<'py, PyAny>, Gradients<'py>, Option<Bound<'py, PyAny>>)> {
    let layer = Layer::read(py, input, linear_weight, linear_bias, &beside, workspace)?;
    let (layout, hidden) = (&layer.layout, &layer.input.tensor);
    let mut losses = Losses::new(py, hidden, &layer.rows(), layout, numbers, dtype, wants_lse)?;
    let gradients = layer.gradients(py, wanted)?;
    let linear = layer.linear(layer.operands.problem(layout, numbers));
    let (hidden, matrix) =
        (hidden.input(layer.input.strides), layer.weight.tensor.input(layer.weight.strides));
    let (targets, results) = (layer.operands.targets()?, losses.results(layout)?);
    let done = if wanted.contains(&true) {
        let grads = gradients.grads();
        py.detach(|| linear.forward_backward_with(hidden, matrix, targets, grads, results))
    } else {
        py.detach(|| linear.forward_with(hidden, matrix, targets, results))
    };
    done.map_err(exception)?;
    Ok((losses.tensor(py)?, gradients.objects(), losses.lse.map(|lse| lse.object)))
}

/// Computes the gradients of a layer from lse.
#[pyfunction]
pub fn linear_cross_entropy_backward<'py>(
    py: Python<'py>,
    grad: &Bound<'py, PyAny>,
    input: &Bound<'py, PyAny>,
    linear_weight: &Bound<'py, PyAny>,
    linear_bias: Option<&Bound<'py, PyAny>>,
    beside: Beside<'py>,
    numbers: &Numbers,
    workspace: usize,
    lse: &Bound<'py, PyAny>,
    wanted: [bool; 3],
) -> PyResult<Gradients<'py>> {
    let layer = Layer::read(py, input, linear_weight, linear_bias, &beside, workspace)?;
    let (layout, rows) = (&layer.layout, layer.rows());
    let grad = grad_output(grad, &rows, layout, numbers.is_reduced())?;
    let lse = Tensor::read("lse", lse)?;
    let Some(lse) = lse.doubles(layout.rows) else {
        let message = format!("lse must be float64, packed, {rows:?}");
        return Err(PyValueError::new_err(message));
    };
    let gradients = layer.gradients(py, wanted)?;
    let problem = layer.operands.problem(layout, numbers).grad_output(grad.input());
    let linear = layer.linear(problem);
    let hidden = layer.input.tensor.input(layer.input.strides);
    let matrix = layer.weight.tensor.input(layer.weight.strides);
    let (targets, grads) = (layer.operands.targets()?, gradients.grads());
    py.detach(|| linear.backward(hidden, matrix, targets, lse, grads)).map_err(exception)?;
    Ok(gradients.objects())
}

/// Computes lse, entropy and argmax of a layer's logits, lists of their `count` largest, and the ranks or divergences of
/// targets.
#[pyfunction]
pub fn linear_evaluate<'py>(
    py: Python<'py>,
    input: &Bound<'py, PyAny>,
    linear_weight: &Bound<'py, PyAny>,
    linear_bias: Option<&Bound<'py, PyAny>>,
    beside: Beside<'py>,
    numbers: &Numbers,
    workspace: usize,
    count: usize,
) -> PyResult<Evaluation<'py>> {
    let layer = Layer::read(py, input, linear_weight, linear_bias, &beside, workspace)?;
    let (layout, operands) = (&layer.layout, &layer.operands);
    let dtype = layer.input.tensor.dtype;
    let mut fields = Fields::new(py, layout, numbers, dtype, count, operands)?;
    let linear = layer.linear(operands.problem(layout, numbers));
    let hidden = layer.input.tensor.input(layer.input.strides);
    let matrix = layer.weight.tensor.input(layer.weight.strides);
    let results = fields.results();
    let done = match operands.are_indices() {
        None => py.detach(|| linear.evaluate(hidden, matrix, results)),
        Some(_) => {
            let targets = operands.targets()?;
            py.detach(|| linear.forward_with(hidden, matrix, targets, results))
        }
    };
    done.map_err(exception)?;
    fields.tensors(&layer.rows(), layout)
}
