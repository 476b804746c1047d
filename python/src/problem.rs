//! What all calls of a loss have in common: the operands beside the logits, and the options.

use crate::layout::Layout;
use crate::tensor::{Axes, Dtype, Tensor};
use crate::threads::{Threads, threads};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use xent::{CrossEntropy, Input, Reduction};

/// The options that are numbers, in the order of `xent_torch.options.NUMBERS_SCHEMA`.
#[derive(FromPyObject)]
struct Values(
    /// The reduction, as PyTorch counts: none, mean, sum.
    u8,
    /// `ignore_index`
    i64,
    /// `label_smoothing`
    f64,
    /// `z_loss`
    f64,
    /// `softcap`
    f64,
    /// `logit_scale`
    f64,
    /// `normalizer`
    f64,
    /// `z_normalizer`
    f64,
    /// `entropy_bonus`
    f64,
    /// `target_scale`
    f64,
    /// `empty_is_zero`
    bool,
    /// `log_probs`
    bool,
);

/// The options that are numbers, read once: a small call would take longer to read them from a tuple than to compute.
#[pyclass(frozen)]
pub struct Numbers(Values);

#[pymethods]
impl Numbers {
    #[new]
    fn new(numbers: Values) -> Self {
        Numbers(numbers)
    }
}

impl Numbers {
    /// Whether the loss is one number.
    pub fn is_reduced(&self) -> bool {
        self.0.0 != 0
    }

    /// Whether the targets are a teacher's logits.
    pub fn is_teacher(&self) -> bool {
        self.0.9 != 0.0
    }

    /// Whether there is no lse, because the logits are log-probabilities.
    pub fn is_log_probs(&self) -> bool {
        self.0.11
    }
}

/// The operands of a loss beside the logits, as Python passes them: `(target, weight, row_weights, row_mask,
/// target_classes)`.
#[derive(FromPyObject)]
pub struct Beside<'py>(
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
);

/// A tensor whose strides are operands of a layout, copied if its own are not.
pub struct Operand<'py> {
    pub tensor: Tensor<'py>,
    pub strides: [i64; 3],
    /// The tensor is a copy that this call has made.
    pub is_copy: bool,
}

impl<'py> Operand<'py> {
    fn new(
        tensor: Tensor<'py>,
        strides: impl Fn(&[i64], &[i64]) -> Option<[i64; 3]>,
    ) -> PyResult<Self> {
        if let Some(own) = strides(&tensor.sizes, &tensor.strides) {
            return Ok(Operand { tensor, strides: own, is_copy: false });
        }
        let packed = tensor.packed()?;
        let Some(own) = strides(&packed.sizes, &packed.strides) else {
            let message = format!("{} has no strides that xent can use", packed.name);
            return Err(PyValueError::new_err(message));
        };
        Ok(Operand { tensor: packed, strides: own, is_copy: true })
    }

    /// An operand with a class axis.
    pub fn full(tensor: Tensor<'py>, layout: &Layout) -> PyResult<Self> {
        Self::new(tensor, |sizes, strides| layout.strides(sizes, strides))
    }

    /// An operand without a class axis.
    pub fn rows(tensor: Tensor<'py>, layout: &Layout) -> PyResult<Self> {
        Self::new(tensor, |sizes, strides| layout.row_strides(sizes, strides))
    }

    /// An operand with a list for each position: its class axis has a length of its own. A copy has the strides of the
    /// layout wherever it cuts.
    fn list(tensor: Tensor<'py>, layout: &Layout) -> PyResult<Self> {
        let list = layout.of_lists(&tensor.sizes);
        if let Some(strides) = list.strides(&tensor.sizes, &tensor.strides) {
            return Ok(Operand { tensor, strides, is_copy: false });
        }
        let (from, to) = layout.list_axes();
        let copy = tensor.packed_with_axis(from, to)?;
        Self::new(copy, |sizes, strides| list.strides(sizes, strides))
    }

    pub fn input(&self) -> Input<'_> {
        self.tensor.input(self.strides)
    }
}

/// The operands of a loss beside the logits, checked against the shape of the logits.
pub struct Operands<'py> {
    target: Option<Operand<'py>>,
    /// Sparse targets: the classes, and how many a row.
    target_classes: Option<(Operand<'py>, usize)>,
    weight: Option<Tensor<'py>>,
    row_weights: Option<Operand<'py>>,
    row_mask: Option<Operand<'py>>,
    threads: Threads,
}

/// The sizes of the logits without the class axis: the shape of row losses and class indices.
pub fn row_sizes(logits: &[i64], class_axis: usize) -> Axes {
    let mut sizes = Axes::from(logits);
    sizes.remove(class_axis);
    sizes
}

/// The class axis of logits: the second, or the only one.
pub fn class_axis(name: &str, sizes: &[i64]) -> PyResult<usize> {
    match sizes.len() {
        0 => Err(PyValueError::new_err(format!("{name} has no class axis: its shape is []"))),
        axes => Ok(usize::from(axes > 1)),
    }
}

/// The targets of a loss.
pub struct Targets<'py> {
    target: Tensor<'py>,
    /// The classes that `target` has the probabilities of; else it has those of all, or class indices.
    classes: Option<Tensor<'py>>,
}

impl<'py> Targets<'py> {
    /// Reads the targets of logits of these sizes, if there are any, and checks their shapes.
    pub fn read(logits: &[i64], beside: &Beside<'py>) -> PyResult<Option<Self>> {
        let Beside(target, .., classes) = beside;
        let target = match target {
            Some(target) => Tensor::read("target", target)?,
            None if classes.is_none() => return Ok(None),
            None => {
                return Err(PyValueError::new_err("target_classes is given, but target is None"));
            }
        };
        if let Some(classes) = classes {
            let classes = Tensor::read("target_classes", classes)?;
            return Self::sparse(logits, target, classes).map(Some);
        }
        let rows = row_sizes(logits, usize::from(logits.len() > 1));
        let is_float = target.dtype.is_float();
        let wanted = if is_float { logits } else { &rows[..] };
        if target.sizes[..] != *wanted {
            let kind = if is_float { "probabilities" } else { "class indices" };
            let shape = target.shape();
            return Err(PyValueError::new_err(format!(
                "target has the shape {shape}, and for logits of the shape {logits:?} {kind} have the shape {wanted:?}"
            )));
        }
        if target.dtype == Dtype::Bool {
            return Err(PyValueError::new_err("target cannot be torch.bool"));
        }
        Ok(Some(Targets { target, classes: None }))
    }

    fn sparse(logits: &[i64], target: Tensor<'py>, classes: Tensor<'py>) -> PyResult<Self> {
        let axis = usize::from(logits.len() > 1);
        let has_lists = classes.sizes.len() == logits.len()
            && row_sizes(&classes.sizes, axis) == row_sizes(logits, axis);
        if !has_lists {
            let mut wanted = logits.iter().map(i64::to_string).collect::<Vec<_>>();
            wanted[axis] = "k".to_string();
            return Err(PyValueError::new_err(format!(
                "target_classes has the shape {}, and for logits of the shape {logits:?} it has the shape [{}]",
                classes.shape(),
                wanted.join(", ")
            )));
        }
        if target.sizes != classes.sizes {
            return Err(PyValueError::new_err(format!(
                "target has the shape {}, and must have that of target_classes, {}",
                target.shape(),
                classes.shape()
            )));
        }
        if !target.dtype.is_float() {
            return Err(PyValueError::new_err(
                "target must be a floating-point tensor beside target_classes",
            ));
        }
        if classes.dtype.is_float() || classes.dtype == Dtype::Bool {
            return Err(PyValueError::new_err("target_classes must be an integer tensor"));
        }
        Ok(Targets { target, classes: Some(classes) })
    }

    /// The targets as a tensor whose class axis is that of the logits: probabilities of all classes.
    pub fn full(&self) -> Option<&Tensor<'py>> {
        Some(&self.target).filter(|target| target.dtype.is_float() && self.classes.is_none())
    }
}

impl<'py> Operands<'py> {
    /// Reads the operands of logits of these sizes, beside the targets. `work` is what decides whether threads are worth
    /// their while.
    pub fn read(
        py: Python<'py>,
        logits: &[i64],
        layout: &Layout,
        work: usize,
        targets: Option<Targets<'py>>,
        beside: &Beside<'py>,
    ) -> PyResult<Self> {
        let Beside(_, weight, row_weights, row_mask, _) = beside;
        let (target, target_classes) = match targets {
            None => (None, None),
            Some(Targets { target, classes: Some(classes) }) => {
                let count = layout.of_lists(&classes.sizes).classes;
                let (target, classes) =
                    (Operand::list(target, layout)?, Operand::list(classes, layout)?);
                (Some(target), Some((classes, count)))
            }
            Some(Targets { target, classes: None }) if target.dtype.is_float() => {
                (Some(Operand::full(target, layout)?), None)
            }
            Some(Targets { target, classes: None }) => (Some(Operand::rows(target, layout)?), None),
        };
        let row_operand = |name: &'static str, object: &Bound<'py, PyAny>| {
            let tensor = Tensor::read(name, object)?;
            let rows = row_sizes(logits, usize::from(logits.len() > 1));
            if tensor.sizes != rows {
                return Err(PyValueError::new_err(format!(
                    "{name} has the shape {}, and must have one element a row, {rows:?}",
                    tensor.shape()
                )));
            }
            Operand::rows(tensor, layout)
        };
        let row_weights =
            row_weights.as_ref().map(|object| row_operand("row_weights", object)).transpose()?;
        let row_mask =
            row_mask.as_ref().map(|object| row_operand("row_mask", object)).transpose()?;
        let weight =
            weight.as_ref().map(|object| vector("weight", object, layout.classes)).transpose()?;
        let threads = threads(py, work)?;
        Ok(Operands { target, target_classes, weight, row_weights, row_mask, threads })
    }

    /// The targets of a call that needs them.
    pub fn targets(&self) -> PyResult<Input<'_>> {
        match &self.target {
            Some(target) => Ok(target.input()),
            None => Err(PyTypeError::new_err("target must be a Tensor, not NoneType")),
        }
    }

    /// Whether the targets are class indices. None if there are no targets.
    pub fn are_indices(&self) -> Option<bool> {
        self.target.as_ref().map(|target| !target.tensor.dtype.is_float())
    }

    /// The problem: its shape, operands and options.
    pub fn problem<'a>(&'a self, layout: &Layout, numbers: &Numbers) -> CrossEntropy<'a> {
        let Values(
            reduction,
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            logit_scale,
            normalizer,
            z_normalizer,
            entropy_bonus,
            target_scale,
            empty_is_zero,
            log_probs,
        ) = numbers.0;
        let reduction = match reduction {
            0 => Reduction::None,
            1 => Reduction::Mean,
            _ => Reduction::Sum,
        };
        let mut problem = CrossEntropy::new(layout.rows, layout.classes)
            .inner(layout.inner)
            .reduction(reduction)
            .ignore_index(ignore_index)
            .label_smoothing(label_smoothing)
            .z_loss(z_loss)
            .softcap(softcap)
            .logit_scale(logit_scale)
            .normalizer(normalizer)
            .z_normalizer(z_normalizer)
            .entropy_bonus(entropy_bonus)
            .target_scale(target_scale)
            .empty_is_zero(empty_is_zero)
            .log_probs(log_probs)
            .threads(self.threads.count);
        if let Some(weight) = &self.weight {
            problem = problem.class_weights(weight.input([0; 3]));
        }
        if let Some(weights) = &self.row_weights {
            problem = problem.row_weights(weights.input());
        }
        if let Some(mask) = &self.row_mask {
            problem = problem.row_mask(mask.input());
        }
        if let Some((classes, count)) = &self.target_classes {
            problem = problem.target_classes(classes.input(), *count);
        }
        if let Some(pool) = &self.threads.pool {
            problem = problem.pool(&**pool);
        }
        problem
    }
}

/// A packed vector of so many floats, copied if it is not packed.
pub fn vector<'py>(
    name: &'static str,
    object: &Bound<'py, PyAny>,
    count: usize,
) -> PyResult<Tensor<'py>> {
    let tensor = Tensor::read(name, object)?;
    if tensor.sizes[..] != [count as i64] {
        return Err(PyValueError::new_err(format!(
            "{name} has the shape {}, and must have one element a class, [{count}]",
            tensor.shape()
        )));
    }
    if tensor.is_packed_vector() { Ok(tensor) } else { tensor.packed() }
}

/// The gradient of what follows a loss: one number, or one a row.
pub fn grad_output<'py>(
    object: &Bound<'py, PyAny>,
    rows: &[i64],
    layout: &Layout,
    is_reduced: bool,
) -> PyResult<Operand<'py>> {
    let tensor = Tensor::read("grad_output", object)?;
    let wanted = if is_reduced { &[][..] } else { rows };
    if tensor.sizes[..] != *wanted {
        return Err(PyValueError::new_err(format!(
            "grad_output has the shape {}, and the loss has the shape {wanted:?}",
            tensor.shape()
        )));
    }
    if is_reduced {
        return Ok(Operand { tensor, strides: [0; 3], is_copy: false });
    }
    Operand::rows(tensor, layout)
}
