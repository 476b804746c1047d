//! The snippets of docs/recipes.md. A test runs them and compares the document with this file.

use xent::{CrossEntropy, Error, Input, Output, Reduction, Results};

/// A loss over the row losses: `of` gets them and writes its derivative with respect to each.
fn through_row_losses(
    logits: &[f32],
    targets: &[i32],
    grad: &mut [f32],
    of: impl FnOnce(&[f64], &mut [f64]) -> f64,
) -> Result<f64, Error> {
    let (rows, classes) = (targets.len(), logits.len() / targets.len());
    let (mut losses, mut lse, mut slopes) = (vec![0.0; rows], vec![0.0; rows], vec![0.0; rows]);
    let call = CrossEntropy::new(rows, classes).reduction(Reduction::None);
    let results = Results {
        row_losses: Some((&mut losses).into()),
        lse: Some(&mut lse),
        ..Results::default()
    };
    call.forward_with(logits, targets, results)?;
    let loss = of(&losses, &mut slopes);
    call.grad_output(&slopes).backward(logits, targets, &lse, grad)?;
    Ok(loss)
}

/// Focal loss, the mean of (1 − p)^γ·l.
fn focal(gamma: f64) -> impl FnOnce(&[f64], &mut [f64]) -> f64 {
    move |losses, slopes| {
        let mut loss = 0.0;
        for (l, slope) in losses.iter().zip(&mut *slopes) {
            let (p, q) = ((-l).exp(), -(-l).exp_m1()); // q = 1 − p
            loss += q.powf(gamma) * l;
            *slope = q.powf(gamma) + gamma * q.powf(gamma - 1.0) * p * l;
        }
        slopes.iter_mut().for_each(|slope| *slope /= losses.len() as f64);
        loss / losses.len() as f64
    }
}

/// PPO's clipped objective, and with β > 0 GRPO's penalty, summed over tokens. `old` and `reference`
/// are row losses of the policies that sampled the tokens and that training began with.
fn grpo<'a>(
    (old, reference, advantages): (&'a [f64], &'a [f64], &'a [f64]),
    (epsilon, beta): (f64, f64),
) -> impl FnOnce(&[f64], &mut [f64]) -> f64 {
    move |losses, slopes| {
        let mut loss = 0.0;
        for (i, (l, slope)) in losses.iter().zip(slopes).enumerate() {
            let (ratio, advantage) = ((old[i] - l).exp(), advantages[i]);
            let clipped = ratio.clamp(1.0 - epsilon, 1.0 + epsilon) * advantage;
            let gap = l - reference[i];
            loss += -clipped.min(ratio * advantage) + beta * (gap.exp_m1() - gap);
            let active = if ratio * advantage <= clipped { ratio * advantage } else { 0.0 };
            *slope = active + beta * gap.exp_m1();
        }
        loss
    }
}

/// DPO for one pair: the first `chosen` rows are the tokens of the better answer, the others those of
/// the worse one. `margin` is the sum of the reference's row losses over the first, less that over the
/// others.
fn dpo(chosen: usize, margin: f64, beta: f64) -> impl FnOnce(&[f64], &mut [f64]) -> f64 {
    move |losses, slopes| {
        let (better, worse) = losses.split_at(chosen);
        let z = beta * (margin - better.iter().sum::<f64>() + worse.iter().sum::<f64>());
        let slope = beta / (1.0 + z.exp());
        slopes[..chosen].fill(slope);
        slopes[chosen..].fill(-slope);
        (-z).exp().ln_1p()
    }
}

/// CLIP: `scores` are [n, n], images by texts. The mean of the loss over rows and that over columns.
fn clip(scores: &[f32], n: usize, grad: &mut [f32]) -> Result<f64, Error> {
    let targets: Vec<u32> = (0..n as u32).collect();
    let half = CrossEntropy::new(n, n).grad_scale(0.5);
    let images = half.forward_backward(scores, &targets, &mut *grad)?;
    let columns = [1, n as i64, 0];
    let texts = half.accumulate(true).forward_backward(
        Input::from(scores).strides(columns),
        &targets,
        Output::from(grad).strides(columns),
    )?;
    Ok((images + texts) / 2.0)
}

/// Rows of `classes` logits, `pitch` apart: the gradient replaces them, and 0 the padding.
fn padded(logits: &mut [f32], targets: &[i32], classes: usize, pitch: usize) -> Result<f64, Error> {
    let rows = targets.len();
    logits[(rows - 1) * pitch + classes..].fill(0.0); // after the last row
    let in_place = Output::from(logits).strides([pitch as i64, 1, 0]);
    CrossEntropy::new(rows, classes).zero_padding(true).forward_backward_in_place(in_place, targets)
}

/// Position t of a sequence predicts token t + 1: logits are [b, t, v], tokens [b, t].
fn causal(
    logits: &[f32],
    tokens: &[i32],
    [b, t, v]: [usize; 3],
    grad: &mut [f32],
) -> Result<f64, Error> {
    let strides = [(t * v) as i64, 1, v as i64];
    let next = Input::from(&tokens[1..]).strides([t as i64, 0, 1]);
    for sequence in grad.chunks_mut(t * v) {
        sequence[(t - 1) * v..].fill(0.0); // the last position predicts nothing
    }
    CrossEntropy::new(b, v).inner(t - 1).forward_backward(
        Input::from(logits).strides(strides),
        next,
        Output::from(grad).strides(strides),
    )
}

/// One part of a batch that is split: `kept` rows of the whole batch have a target. The losses of all
/// parts add up to the loss of the batch, their gradients to its gradient.
fn part(logits: &[f32], targets: &[i32], kept: usize, grad: &mut [f32]) -> Result<f64, Error> {
    let classes = logits.len() / targets.len();
    let call = CrossEntropy::new(targets.len(), classes).normalizer(kept as f64);
    call.forward_backward(logits, targets, grad)
}

/// Asserts that a gradient is that of a loss, by differences.
fn check(logits: &[f32], grad: &[f32], loss: impl Fn(&[f32]) -> f64) {
    for i in 0..logits.len() {
        let at = |step: f32| {
            let mut moved = logits.to_vec();
            moved[i] += step;
            loss(&moved)
        };
        let step = 1.0 / 256.0;
        let slope = (at(step) - at(-step)) / f64::from(2.0 * step);
        assert!((slope - f64::from(grad[i])).abs() < 1e-4, "{i}: {slope}, not {}", grad[i]);
    }
}

/// Runs the recipes on a problem of 4 rows of 5 classes.
pub fn main() -> Result<(), Error> {
    let logits: Vec<f32> = (0..20).map(|i| (i * 7 % 11) as f32 / 4.0 - 1.0).collect();
    let targets = [3, 0, 4, 1];
    let mut grad = vec![0.0; 20];

    through_row_losses(&logits, &targets, &mut grad, focal(2.0))?;
    let again =
        |x: &[f32]| through_row_losses(x, &targets, &mut [0.0; 20], focal(2.0)).unwrap_or(f64::NAN);
    check(&logits, &grad, again);

    let policies: [&[f64]; 3] =
        [&[2.0, 1.0, 2.5, 0.5], &[1.0, 2.0, 1.5, 0.25], &[1.0, -1.0, 2.0, -0.5]];
    let objective = || grpo((policies[0], policies[1], policies[2]), (0.2, 0.04));
    through_row_losses(&logits, &targets, &mut grad, objective())?;
    let again = |x: &[f32]| {
        through_row_losses(x, &targets, &mut [0.0; 20], objective()).unwrap_or(f64::NAN)
    };
    check(&logits, &grad, again);

    through_row_losses(&logits, &targets, &mut grad, dpo(3, 2.0, 0.5))?;
    let again = |x: &[f32]| {
        through_row_losses(x, &targets, &mut [0.0; 20], dpo(3, 2.0, 0.5)).unwrap_or(f64::NAN)
    };
    check(&logits, &grad, again);

    let mut square = [0.0; 16];
    clip(&logits[..16], 4, &mut square)?;
    check(&logits[..16], &square, |x| clip(x, 4, &mut [0.0; 16]).unwrap_or(f64::NAN));

    // Rows of 3 classes in rows of 5.
    let mut wide = logits.clone();
    let few = [2, 0, 1, -100];
    padded(&mut wide, &few, 3, 5)?;
    assert!((0..20).filter(|i| i % 5 >= 3).all(|i| wide[i] == 0.0));
    check(&logits, &wide, |x| padded(&mut x.to_vec(), &few, 3, 5).unwrap_or(f64::NAN));

    // Two sequences of two tokens.
    causal(&logits, &targets, [2, 2, 5], &mut grad)?;
    assert!(grad[5..10].iter().chain(&grad[15..]).all(|&g| g == 0.0));
    check(&logits, &grad, |x| causal(x, &targets, [2, 2, 5], &mut [0.0; 20]).unwrap_or(f64::NAN));

    // The batch, then two parts of it, of which the second has a row without a target.
    let targets = [3, 0, -100, 1];
    let whole = CrossEntropy::new(4, 5).forward_backward(&logits, &targets, &mut grad)?;
    let kept = targets.iter().filter(|&&target| target != -100).count();
    let mut parts = vec![0.0; 20];
    let (first, second) = parts.split_at_mut(10);
    let sum = part(&logits[..10], &targets[..2], kept, first)?
        + part(&logits[10..], &targets[2..], kept, second)?;
    assert!((sum - whole).abs() < 1e-12);
    assert_eq!(parts, grad);
    println!("all gradients are those of their losses");
    Ok(())
}
