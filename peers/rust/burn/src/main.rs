//! burn on its own CPU backend: log-softmax, gather and mean, as its `CrossEntropyLoss` has them, and
//! the gradient by its autodiff.

#[path = "../../serve.rs"]
mod serve;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serve::{Step, Task, serve};

fn loss(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let rows = targets.dims()[0];
    log_softmax(logits, 1).gather(1, targets.reshape([rows, 1])).mean().neg()
}

fn prepare(task: Task) -> Result<Step, String> {
    if task.bf16 {
        return Err("its CPU backend is used with f32".to_string());
    }
    let (logits, targets) = (task.logits(), task.targets());
    let logits = TensorData::new(logits, [task.rows, task.classes]);
    let targets = TensorData::new(targets, [task.rows]);
    let device = if task.backward { Device::flex().autodiff() } else { Device::flex() };
    let logits = Tensor::<2>::from_data(logits, &device);
    let targets = Tensor::<1, Int>::from_data(targets, &device);
    Ok(Box::new(move || {
        if !task.backward {
            return Ok(f64::from(loss(logits.clone(), targets.clone()).into_scalar::<f32>()));
        }
        let x = logits.clone().require_grad();
        let loss = loss(x.clone(), targets.clone());
        let value = loss.clone().into_scalar::<f32>();
        let gradients = loss.backward();
        std::hint::black_box(x.grad(&gradients));
        Ok(f64::from(value))
    }))
}

fn main() {
    serve("0.22.0", prepare);
}
