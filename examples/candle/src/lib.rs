//! Cross-entropy for candle, computed by xent: [`cross_entropy`] takes the place of
//! `candle_nn::loss::cross_entropy`. It reads the logits once and stores one gradient of their size, where
//! candle's own stores log-probabilities and more.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Error, Layout, Result, Shape, Tensor, WithDType,
};
use std::sync::OnceLock;
use xent::{CrossEntropy, Input, Number, Output};

/// The mean of `−ln softmax(logits)` at the targets: logits `[rows, classes]` of f32, f64, bf16 or f16 with
/// any strides, targets `[rows]` of u32, u8 or i64, on the CPU.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    logits.apply_op1(Loss {
        targets: targets.to_dtype(DType::I64)?.to_vec1()?,
        wants_gradient: logits.track_op(),
        gradient: OnceLock::new(),
    })
}

/// The loss as a node of candle's graph. The forward computes the gradient too, if the graph will ask for
/// it: one call reads the logits once.
struct Loss {
    targets: Vec<i64>,
    wants_gradient: bool,
    gradient: OnceLock<Tensor>,
}

impl Loss {
    fn forward<T: WithDType + Number>(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> Result<(CpuStorage, Shape)>
    where
        for<'a> Input<'a>: From<&'a [T]>,
        for<'a> Output<'a>: From<&'a mut Vec<T>>,
    {
        let (rows, classes) = layout.shape().dims2()?;
        if self.targets.len() != rows {
            candle_core::bail!("{} targets for {rows} rows", self.targets.len());
        }
        let logits = &T::cpu_storage_as_slice(storage)?[layout.start_offset()..];
        let strides = [layout.stride()[0] as i64, layout.stride()[1] as i64, 1];
        let logits = Input::from(logits).strides(strides);
        let call = CrossEntropy::new(rows, classes);
        let loss = if self.wants_gradient {
            let mut gradient = vec![T::zero(); rows * classes];
            let loss = call.forward_backward(logits, &self.targets, &mut gradient);
            let gradient = Tensor::from_vec(gradient, (rows, classes), &Device::Cpu)?;
            // A graph computes each of its nodes once.
            let _ = self.gradient.set(gradient);
            loss
        } else {
            call.forward(logits, &self.targets)
        };
        let loss = T::from_f64(loss.map_err(Error::wrap)?);
        Ok((T::to_cpu_storage_owned(vec![loss]), Shape::from(())))
    }
}

impl CustomOp1 for Loss {
    fn name(&self) -> &'static str {
        "xent-cross-entropy"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match storage.dtype() {
            DType::F32 => self.forward::<f32>(storage, layout),
            DType::F64 => self.forward::<f64>(storage, layout),
            DType::BF16 => self.forward::<xent::half::bf16>(storage, layout),
            DType::F16 => self.forward::<xent::half::f16>(storage, layout),
            other => candle_core::bail!("logits of {}", other.as_str()),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad_loss: &Tensor) -> Result<Option<Tensor>> {
        let Some(gradient) = self.gradient.get() else {
            candle_core::bail!("the forward computed no gradient");
        };
        Ok(Some(gradient.broadcast_mul(grad_loss)?))
    }
}
