//! What DLPack's exchange interface says of a tensor: one call in place of a method for each of sizes, strides, address,
//! dtype and device, each of which takes as long.
//!
//! The structs are those of dlpack.h, version 1.3 (<https://github.com/dmlc/dlpack>). Every version with the first number
//! 1 has them.

use crate::tensor::{Axes, Dtype, Tensor};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods, PyType};
use std::ffi::{c_int, c_void};

#[repr(C)]
struct DLTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// kDLCPU
const CPU: i32 = 1;

#[repr(C)]
struct DLPackExchangeAPI {
    major: u32,
    minor: u32,
    prev_api: *const c_void,
    managed_tensor_allocator: *const c_void,
    managed_tensor_from_py_object_no_sync: *const c_void,
    managed_tensor_to_py_object_no_sync: *const c_void,
    dltensor_from_py_object_no_sync:
        Option<unsafe extern "C" fn(object: *mut c_void, out: *mut DLTensor) -> c_int>,
    current_work_stream: *const c_void,
}

/// torch's function that describes a tensor.
pub struct Exchange(unsafe extern "C" fn(object: *mut c_void, out: *mut DLTensor) -> c_int);

impl Exchange {
    /// The function of `torch.Tensor`. None where torch is too old to have it.
    pub fn of(tensor: &Bound<'_, PyType>) -> PyResult<Option<Exchange>> {
        let Ok(capsule) = tensor.getattr("__dlpack_c_exchange_api__") else {
            return Ok(None);
        };
        let capsule = capsule.cast_into::<PyCapsule>()?;
        let api = capsule.pointer_checked(Some(c"dlpack_exchange_api"))?;
        // SAFETY: DLPack states that a capsule of this name holds the struct, for as long as the process lives. Its
        // first two members are the same in every version.
        let api = unsafe { &*api.as_ptr().cast::<DLPackExchangeAPI>() };
        Ok(if api.major == 1 { api.dltensor_from_py_object_no_sync.map(Exchange) } else { None })
    }

    /// Describes a tensor. None if it is no operand as it is, of which [`Tensor::ask`] has the reason.
    pub fn describe<'py>(
        &self,
        name: &'static str,
        object: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Tensor<'py>>> {
        let mut of = DLTensor {
            data: std::ptr::null_mut(),
            device_type: 0,
            device_id: 0,
            ndim: 0,
            code: 0,
            bits: 0,
            lanes: 0,
            shape: std::ptr::null(),
            strides: std::ptr::null(),
            byte_offset: 0,
        };
        // SAFETY: the object is a `torch.Tensor`, as `Tensor::read` has checked or torch has just made it, and this
        // thread holds the GIL. The function fills the struct, or fails with a Python exception.
        if unsafe { (self.0)(object.as_ptr().cast(), &mut of) } != 0 {
            drop(PyErr::take(object.py()));
            return Ok(None);
        }
        let dtype = match (of.code, of.bits, of.lanes) {
            (2, 32, 1) => Dtype::F32,
            (2, 64, 1) => Dtype::F64,
            (2, 16, 1) => Dtype::F16,
            (4, 16, 1) => Dtype::Bf16,
            (0, 64, 1) => Dtype::I64,
            (0, 32, 1) => Dtype::I32,
            (1, 8, 1) => Dtype::U8,
            (1, 16, 1) => Dtype::U16,
            (1, 32, 1) => Dtype::U32,
            (6, 8, 1) => Dtype::Bool,
            _ => return Ok(None),
        };
        if of.device_type != CPU {
            return Ok(None);
        }
        let ndim = of.ndim as usize;
        if ndim > 0 && (of.shape.is_null() || of.strides.is_null()) {
            return Err(PyRuntimeError::new_err("DLPack describes a tensor without strides"));
        }
        let numbers = |from: *const i64| match ndim {
            0 => Axes::new(),
            // SAFETY: DLPack states that both arrays have `ndim` elements, which belong to the tensor, and `object`
            // keeps the tensor alive. They are not null, as just checked.
            _ => unsafe { std::slice::from_raw_parts(from, ndim) }.into(),
        };
        Ok(Some(Tensor {
            name,
            dtype,
            sizes: numbers(of.shape),
            strides: numbers(of.strides),
            data: (of.data as usize).wrapping_add(of.byte_offset as usize),
            object: object.clone(),
        }))
    }
}
