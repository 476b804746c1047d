//! Tensors as operands: what DLPack or their methods say of them, checked, and new tensors for results.

use crate::dlpack;
use half::{bf16, f16};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};
use smallvec::SmallVec;
use xent::{Input, Output};

/// The dtypes of tensors that the library has an operand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F64,
    Bf16,
    F16,
    I64,
    I32,
    U32,
    U16,
    U8,
    /// Bytes of 0 and 1, for row masks alone.
    Bool,
}

/// Bytes of a tensor from which large pages are asked for, as NumPy does.
#[cfg(target_os = "linux")]
const LARGE_PAGES_FROM: usize = 4 << 20;

/// All of them, with their names in torch. Those of most calls come first.
const DTYPES: [(Dtype, &str); 10] = [
    (Dtype::F32, "float32"),
    (Dtype::I64, "int64"),
    (Dtype::Bf16, "bfloat16"),
    (Dtype::F16, "float16"),
    (Dtype::F64, "float64"),
    (Dtype::I32, "int32"),
    (Dtype::U8, "uint8"),
    (Dtype::Bool, "bool"),
    (Dtype::U16, "uint16"),
    (Dtype::U32, "uint32"),
];

impl Dtype {
    pub fn is_float(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::F64 | Dtype::Bf16 | Dtype::F16)
    }

    fn size(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 | Dtype::U32 => 4,
            Dtype::Bf16 | Dtype::F16 | Dtype::U16 => 2,
            Dtype::U8 | Dtype::Bool => 1,
        }
    }
}

/// What the crate uses of the module torch.
pub struct Torch {
    tensor: Py<PyType>,
    strided: Py<PyAny>,
    dtypes: Vec<(Dtype, Py<PyAny>)>,
    /// `{"dtype": ..}` of each dtype, in the same order.
    keywords: Vec<Py<PyDict>>,
    empty: Py<PyAny>,
    empty_like: Py<PyAny>,
    /// A tensor without axes of each dtype, in the same order.
    scalars: Vec<Py<PyAny>>,
    exchange: Option<dlpack::Exchange>,
    pub get_num_threads: Py<PyAny>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

/// torch, which is imported at the first use.
pub fn torch(py: Python<'_>) -> PyResult<&'static Torch> {
    TORCH.get_or_try_init(py, || {
        let torch = py.import("torch")?;
        let get = |name| torch.getattr(name).map(Bound::unbind);
        let dtypes = DTYPES.iter().map(|&(dtype, name)| Ok((dtype, get(name)?)));
        let dtypes = dtypes.collect::<PyResult<Vec<_>>>()?;
        let keywords = dtypes.iter().map(|(_, object)| {
            let keywords = PyDict::new(py);
            keywords.set_item("dtype", object).map(|()| keywords.unbind())
        });
        let keywords = keywords.collect::<PyResult<Vec<Py<PyDict>>>>()?;
        let scalars = keywords.iter().map(|keywords| {
            let keywords = keywords.bind(py).copy()?;
            keywords.set_item("device", "cpu")?;
            torch.call_method("empty", ((),), Some(&keywords)).map(Bound::unbind)
        });
        let tensor = torch.getattr("Tensor")?.cast_into::<PyType>()?;
        Ok(Torch {
            strided: get("strided")?,
            dtypes,
            scalars: scalars.collect::<PyResult<_>>()?,
            keywords,
            empty: get("empty")?,
            empty_like: get("empty_like")?,
            exchange: dlpack::Exchange::of(&tensor)?,
            tensor: tensor.unbind(),
            get_num_threads: get("get_num_threads")?,
        })
    })
}

impl Torch {
    /// The dtype that a `torch.dtype` stands for.
    pub fn dtype(&self, of: &Bound<'_, PyAny>) -> Option<Dtype> {
        self.dtypes.iter().find(|(_, object)| object.is(of)).map(|&(dtype, _)| dtype)
    }

    fn index(&self, dtype: Dtype) -> usize {
        let at = self.dtypes.iter().position(|&(candidate, _)| candidate == dtype);
        at.expect("every dtype is in the list")
    }

    /// The `torch.dtype` of a dtype.
    fn object(&self, dtype: Dtype) -> &Py<PyAny> {
        &self.dtypes[self.index(dtype)].1
    }

    /// A tensor of a dtype without axes.
    fn scalar<'py>(&self, py: Python<'py>, dtype: Dtype) -> &Bound<'py, PyAny> {
        self.scalars[self.index(dtype)].bind(py)
    }

    /// The keyword argument of a dtype.
    fn keywords<'py>(&self, py: Python<'py>, dtype: Dtype) -> &Bound<'py, PyDict> {
        self.keywords[self.index(dtype)].bind(py)
    }
}

/// `$operand::from_raw` of an address, as a pointer to the elements of a dtype.
macro_rules! operand {
    ($operand:ident, $kind:tt, $dtype:expr, $at:expr, $strides:expr) => {
        match $dtype {
            Dtype::F32 => $operand::from_raw($at as *$kind f32, $strides),
            Dtype::F64 => $operand::from_raw($at as *$kind f64, $strides),
            Dtype::Bf16 => $operand::from_raw($at as *$kind bf16, $strides),
            Dtype::F16 => $operand::from_raw($at as *$kind f16, $strides),
            Dtype::I64 => $operand::from_raw($at as *$kind i64, $strides),
            Dtype::I32 => $operand::from_raw($at as *$kind i32, $strides),
            Dtype::U32 => $operand::from_raw($at as *$kind u32, $strides),
            Dtype::U16 => $operand::from_raw($at as *$kind u16, $strides),
            Dtype::U8 | Dtype::Bool => $operand::from_raw($at as *$kind u8, $strides),
        }
    };
}

/// A number for each axis of a tensor. Most tensors have few axes, and need no memory for them.
pub type Axes = SmallVec<[i64; 5]>;

/// A strided tensor on the CPU whose dtype the library has.
///
/// Every element that the sizes and strides reach from `data` lies in the tensor's storage ([`Tensor::read`] checks it,
/// and torch sees to it for tensors that it has just made), and the storage lives as long as the object does.
pub struct Tensor<'py> {
    pub object: Bound<'py, PyAny>,
    pub name: &'static str,
    pub dtype: Dtype,
    pub sizes: Axes,
    pub strides: Axes,
    pub data: usize,
}

impl<'py> Tensor<'py> {
    /// Reads and checks an argument. `name` is that of messages.
    pub fn read(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let torch = torch(py)?;
        if !object.is_instance(torch.tensor.bind(py))? {
            return Err(PyTypeError::new_err(format!(
                "{name} must be a Tensor, not {}",
                object.get_type().name()?
            )));
        }
        let mut tensor = match &torch.exchange {
            Some(exchange) => match exchange.describe(name, object)? {
                Some(tensor) => tensor,
                None => Self::ask(name, object)?,
            },
            None => Self::ask(name, object)?,
        };
        // The imaginary part of a conjugate has its sign in a bit beside the memory.
        let has_sign = tensor.dtype.is_float();
        if has_sign && object.call_method0(intern!(py, "is_neg"))?.extract::<bool>()? {
            tensor = Self::ask(name, &object.call_method0(intern!(py, "resolve_neg"))?)?;
        }
        tensor.check_storage()?;
        Ok(tensor)
    }

    /// What the methods of a tensor say of it. A tensor that is no operand is a ValueError.
    fn ask(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let torch = torch(py)?;
        if !object.getattr(intern!(py, "is_cpu"))?.extract::<bool>()? {
            let device = object.getattr(intern!(py, "device"))?;
            return Err(PyValueError::new_err(format!(
                "{name} is on {device}, and xent computes on the CPU"
            )));
        }
        let layout = object.getattr(intern!(py, "layout"))?;
        if !layout.is(&torch.strided) {
            return Err(PyValueError::new_err(format!(
                "{name} is {layout}, and must be torch.strided"
            )));
        }
        let of = object.getattr(intern!(py, "dtype"))?;
        let Some(dtype) = torch.dtype(&of) else {
            return Err(PyValueError::new_err(format!("{name} cannot be {of}")));
        };
        Ok(Tensor {
            name,
            dtype,
            sizes: numbers(&object.getattr(intern!(py, "shape"))?)?,
            strides: numbers(&object.call_method0(intern!(py, "stride"))?)?,
            data: object.call_method0(intern!(py, "data_ptr"))?.extract()?,
            object: object.clone(),
        })
    }

    /// A tensor that torch has just made, whose storage fits.
    fn made(object: Bound<'py, PyAny>) -> PyResult<Self> {
        let name = "a result";
        match &torch(object.py())?.exchange {
            Some(exchange) => match exchange.describe(name, &object)? {
                Some(tensor) => Ok(tensor),
                None => Self::ask(name, &object),
            },
            None => Self::ask(name, &object),
        }
    }

    /// Whoever shrinks a storage leaves tensors that reach past its end.
    fn check_storage(&self) -> PyResult<()> {
        if self.elements() == 0 {
            return Ok(());
        }
        let py = self.object.py();
        let storage = self.object.call_method0(intern!(py, "untyped_storage"))?;
        let bytes = storage.len()?;
        let start = storage.call_method0(intern!(py, "data_ptr"))?.extract::<usize>()?;
        let steps = self.sizes.iter().zip(&self.strides);
        let last =
            steps.map(|(&size, &stride)| (size as usize - 1).saturating_mul(stride as usize));
        let last = last.fold(0usize, usize::saturating_add);
        let end = last.saturating_add(1).saturating_mul(self.dtype.size());
        let offset = self.data.wrapping_sub(start);
        if self.data == 0 || offset.saturating_add(end) > bytes {
            return Err(PyValueError::new_err(format!(
                "{} reaches past the end of its storage of {bytes} bytes",
                self.name
            )));
        }
        Ok(())
    }

    /// The same values in memory of their own, packed.
    pub fn packed(&self) -> PyResult<Self> {
        let object = self.object.call_method0(intern!(self.object.py(), "contiguous"))?;
        Ok(Tensor { name: self.name, ..Self::made(object)? })
    }

    /// The same values in memory of their own, packed as if the axis `from` were at `to`.
    pub fn packed_with_axis(&self, from: usize, to: usize) -> PyResult<Self> {
        let py = self.object.py();
        let moved = self.object.call_method1(intern!(py, "movedim"), (from, to))?;
        let packed = moved.call_method0(intern!(py, "contiguous"))?;
        let object = packed.call_method1(intern!(py, "movedim"), (to, from))?;
        Ok(Tensor { name: self.name, ..Self::made(object)? })
    }

    pub fn elements(&self) -> usize {
        self.sizes.iter().map(|&size| size as usize).product()
    }

    /// The address, or an aligned one where there are no elements.
    fn address(&self) -> usize {
        if self.elements() == 0 { self.dtype.size() } else { self.data }
    }

    /// The operand that a call reads, with the strides that [`Layout`](crate::layout::Layout) made of the tensor's.
    pub fn input(&self, strides: [i64; 3]) -> Input<'_> {
        let at = self.address();
        // SAFETY: sizes and strides stay within the storage (see [`Tensor`]), which lives while `object` does,
        // and a layout's strides reach the same elements. Bytes of a storage are initialised as far as torch is
        // concerned, and every bit pattern is a value of these types. As with torch's own operators, the program must
        // not write a tensor on one thread while a call reads it on another.
        unsafe { operand!(Input, const, self.dtype, at, strides) }
    }

    /// The operand that a call writes, as [`Tensor::input`]. Integers are no outputs, and the call refuses them.
    pub fn output(&self, strides: [i64; 3]) -> Output<'_> {
        let at = self.address();
        // SAFETY: sizes and strides stay within the storage (see [`Tensor`]), which lives while `object` does,
        // and a layout's strides reach the same elements; the call refuses strides by which they share addresses. The
        // tensor is one that this call has made, or logits that the program lets the gradient replace, which nobody
        // else accesses meanwhile.
        unsafe { operand!(Output, mut, self.dtype, at, strides) }
    }

    /// Whether the tensor is a packed and aligned vector of so many elements of 8 bytes.
    fn is_vector(&self, count: usize, dtype: Dtype) -> bool {
        self.dtype == dtype
            && self.sizes[..] == [count as i64]
            && self.is_packed_vector()
            && self.address().is_multiple_of(8)
    }

    /// The numbers of a packed f64 tensor. None if it is another tensor.
    pub fn doubles(&self, count: usize) -> Option<&[f64]> {
        if !self.is_vector(count, Dtype::F64) {
            return None;
        }
        // SAFETY: `count` packed and aligned elements of f64, just checked, in a storage that lives while `object` does.
        // `read` has checked that the storage holds them, or torch has made it for them.
        Some(unsafe { std::slice::from_raw_parts(self.address() as *const f64, count) })
    }

    /// [`Tensor::doubles`] of a tensor that this call has made.
    pub fn doubles_mut(&mut self, count: usize) -> Option<&mut [f64]> {
        self.doubles(count)?;
        // SAFETY: `doubles` has checked count, alignment and storage; nobody but this call knows the tensor.
        Some(unsafe { std::slice::from_raw_parts_mut(self.address() as *mut f64, count) })
    }

    /// The numbers of a packed i64 tensor that this call has made, as [`Tensor::doubles_mut`].
    pub fn integers_mut(&mut self, count: usize) -> Option<&mut [i64]> {
        if !self.is_vector(count, Dtype::I64) {
            return None;
        }
        // SAFETY: `count` packed and aligned elements of i64, just checked, which torch has made for them and whose
        // storage lives while `object` does; nobody but this call knows the tensor.
        Some(unsafe { std::slice::from_raw_parts_mut(self.address() as *mut i64, count) })
    }

    /// The tensor with other sizes, of as many elements.
    pub fn view(&self, sizes: &[i64]) -> PyResult<Bound<'py, PyAny>> {
        let py = self.object.py();
        self.object.call_method1(intern!(py, "view"), (PyTuple::new(py, sizes)?,))
    }

    /// Whether the tensor is a vector whose elements follow one another.
    pub fn is_packed_vector(&self) -> bool {
        self.sizes.len() == 1 && (self.strides[0] == 1 || self.sizes[0] <= 1)
    }

    /// A packed tensor that torch has just allocated.
    fn without_values(object: Bound<'py, PyAny>) -> PyResult<Self> {
        let made = Self::made(object)?;
        made.prefer_large_pages();
        Ok(made)
    }

    /// Asks the system for large pages for the memory of a new tensor. A gradient is written in memory that nobody
    /// has touched, and without them the system takes longer to hand out its pages than xent to write them. A system
    /// without such pages says no, which changes nothing.
    #[cfg(target_os = "linux")]
    fn prefer_large_pages(&self) {
        const PAGE: usize = 4096;
        let (start, end) = (self.address().next_multiple_of(PAGE), self.address() + self.bytes());
        if end.saturating_sub(start) < LARGE_PAGES_FROM {
            return;
        }
        // SAFETY: torch has just allocated the tensor, packed (`without_values`), so that `bytes` from its address on are its
        // own, and the pages begin after that address; the advice changes no byte.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }

    #[cfg(not(target_os = "linux"))]
    fn prefer_large_pages(&self) {}

    /// The bytes of the elements of a packed tensor.
    #[cfg(target_os = "linux")]
    fn bytes(&self) -> usize {
        self.sizes.iter().product::<i64>() as usize * self.dtype.size()
    }

    /// A tensor without values, `[sizes]`, packed.
    pub fn empty(py: Python<'py>, sizes: &[i64], dtype: Dtype) -> PyResult<Self> {
        let torch = torch(py)?;
        let sizes = PyTuple::new(py, sizes)?;
        Self::without_values(torch.empty.bind(py).call((sizes,), Some(torch.keywords(py, dtype)))?)
    }

    /// A tensor without values, with the sizes, dtype and order of axes of this one.
    pub fn empty_like(&self) -> PyResult<Self> {
        let py = self.object.py();
        Self::without_values(torch(py)?.empty_like.bind(py).call1((&self.object,))?)
    }

    /// The tensor of no axes that holds a number. `empty_like`, which has just made the gradient, takes half as long as
    /// `scalar_tensor`.
    pub fn scalar(py: Python<'py>, value: f64, dtype: Dtype) -> PyResult<Bound<'py, PyAny>> {
        let like = torch(py)?.scalar(py, dtype);
        let made = Self::made(torch(py)?.empty_like.bind(py).call1((like,))?)?;
        let at = made.data as *mut u8;
        // SAFETY: torch has just made the tensor, of one element of `dtype`, aligned for every dtype; nobody but this call
        // knows it.
        unsafe {
            match dtype {
                Dtype::F32 => at.cast::<f32>().write(value as f32),
                Dtype::F64 => at.cast::<f64>().write(value),
                Dtype::Bf16 => at.cast::<bf16>().write(bf16::from_f64(value)),
                Dtype::F16 => at.cast::<f16>().write(f16::from_f64(value)),
                _ => unreachable!("a loss is a floating-point number"),
            }
        }
        Ok(made.object)
    }

    /// The tensor in another dtype.
    pub fn to(&self, dtype: Dtype) -> PyResult<Bound<'py, PyAny>> {
        let py = self.object.py();
        self.object.call_method1(intern!(py, "to"), (torch(py)?.object(dtype),))
    }

    /// The sizes, as Python prints them.
    pub fn shape(&self) -> String {
        format!("{:?}", self.sizes)
    }
}

/// The integers of a `torch.Size` or of strides. Sizes and strides that are symbols are no integers.
fn numbers(of: &Bound<'_, PyAny>) -> PyResult<Axes> {
    of.cast::<PyTuple>()?.iter().map(|number| number.extract()).collect()
}
