//! Loss and gradient equal those of candle's own cross-entropy.

use candle_core::{DType, Device, Result, Tensor, Var};

/// Numbers from −6 to 6 without a random generator.
fn logits(rows: usize, classes: usize) -> Result<Tensor> {
    let hash = |i: usize| (i as u32 ^ 0x5bd1).wrapping_mul(2_654_435_761) >> 8;
    let all = (0..rows * classes).map(|i| f64::from(hash(i)) * 12.0 / f64::from(1 << 24) - 6.0);
    Tensor::from_iter(all, &Device::Cpu)?.reshape((rows, classes))
}

fn targets(rows: usize, classes: usize) -> Result<Tensor> {
    Tensor::from_iter((0..rows).map(|row| (row * 7919 % classes) as u32), &Device::Cpu)
}

/// The loss, and the gradient of `3·loss` with respect to the variable.
fn both(
    x: &Var,
    of: impl Fn(&Tensor) -> Result<Tensor>,
    loss: fn(&Tensor, &Tensor) -> Result<Tensor>,
    targets: &Tensor,
) -> Result<(f64, Vec<f64>)> {
    let loss = loss(&of(x)?, targets)?;
    let grads = loss.affine(3.0, 0.0)?.backward()?;
    let grad = grads.get(x).expect("a gradient").to_dtype(DType::F64)?.flatten_all()?;
    Ok((loss.to_dtype(DType::F64)?.to_scalar()?, grad.to_vec1()?))
}

fn compare(dtype: DType, tolerance: f64, transposed: bool) -> Result<()> {
    for (rows, classes) in [(1, 1), (1, 10), (7, 10), (33, 1000), (3, 32_000)] {
        let values = logits(rows, classes)?.to_dtype(dtype)?;
        let x = Var::from_tensor(&if transposed { values.t()?.contiguous()? } else { values })?;
        let of = |x: &Tensor| if transposed { x.t() } else { Ok(x.clone()) };
        let targets = targets(rows, classes)?;
        let (loss, grad) = both(&x, of, xent_candle::cross_entropy, &targets)?;
        // candle would round each step of a loss of halves. xent computes in f32, and so does this.
        let wide = if dtype == DType::BF16 { DType::F32 } else { dtype };
        let of = |x: &Tensor| of(x)?.to_dtype(wide);
        let (want, want_grad) = both(&x, of, candle_nn::loss::cross_entropy, &targets)?;
        let what = format!("{rows}x{classes} {dtype:?}");
        assert!((loss - want).abs() <= tolerance * want.abs().max(1.0), "{what}: {loss}, {want}");
        assert!(classes == 1 || grad.iter().any(|g| *g != 0.0), "{what}");
        for (got, want) in grad.iter().zip(&want_grad) {
            assert!((got - want).abs() <= tolerance * 3.0 / rows as f64, "{what}: {got}, {want}");
        }
    }
    Ok(())
}

#[test]
fn of_f32() -> Result<()> {
    compare(DType::F32, 2e-6, false)
}

#[test]
fn of_f64() -> Result<()> {
    compare(DType::F64, 1e-14, false)
}

#[test]
fn of_bf16() -> Result<()> {
    compare(DType::BF16, 8e-3, false)
}

/// A transposed view: the strides go to xent, and nothing is copied.
#[test]
fn of_a_transposed_view() -> Result<()> {
    compare(DType::F32, 2e-6, true)
}

#[test]
fn faults_are_errors() -> Result<()> {
    let x = logits(2, 4)?;
    let message = |targets: &[i64]| -> Result<String> {
        let targets = Tensor::new(targets, &Device::Cpu)?;
        Ok(xent_candle::cross_entropy(&x, &targets).unwrap_err().to_string())
    };
    assert!(message(&[0, 4])?.contains("targets[1] = 4"), "{}", message(&[0, 4])?);
    assert!(message(&[0])?.contains("1 targets for 2 rows"));
    Ok(())
}
