//! candle: `candle_nn::loss::cross_entropy` and its gradient.

#[path = "../../serve.rs"]
mod serve;

use candle_core::{DType, Device, Tensor, Var};
use serve::{Step, Task, serve};

fn prepare(task: Task) -> Result<Step, String> {
    let dtype = if task.bf16 { DType::BF16 } else { DType::F32 };
    let text = |error: candle_core::Error| error.to_string();
    let targets: Vec<u32> = task.targets().iter().map(|&t| t as u32).collect();
    let targets = Tensor::new(targets, &Device::Cpu).map_err(text)?;
    let logits = Tensor::from_vec(task.logits(), (task.rows, task.classes), &Device::Cpu)
        .and_then(|logits| logits.to_dtype(dtype))
        .map_err(text)?;
    let variable = Var::from_tensor(&logits).map_err(text)?;
    Ok(Box::new(move || {
        let step = || {
            // A plain tensor builds no graph.
            let x = if task.backward { variable.as_tensor() } else { &logits };
            let loss = candle_nn::loss::cross_entropy(x, &targets)?;
            if task.backward {
                loss.backward()?;
            }
            loss.to_dtype(DType::F64)?.to_scalar::<f64>()
        };
        step().map_err(text)
    }))
}

fn main() {
    serve("0.11.1", prepare);
}
