//! One function for each feature, to copy from. The README lists them.
//!
//! `cargo run --example features` prints each figure, and panics if a figure is not as expected.

use xent::half::{bf16, f16};
use xent::{
    CrossEntropy, Error, Input, Linear, LinearGrads, Output, Partial, Pool, Reduction, Results,
    Softmax,
};

fn expect(what: &str, got: impl Into<f64>, expected: f64) {
    let got = got.into();
    println!("{what:<44} {got:10.6}");
    let met = (got - expected).abs() <= 1e-6 * (1.0 + expected.abs());
    assert!(met, "{what}: expected {expected:.6}, got {got}");
}

/// Double precision: these logits are one and the same `f32`.
fn f64_logits() -> Result<(), Error> {
    let logits = [1e6 + 0.001, 1e6 + 0.002, 1e6 + 0.003, 1e6 + 0.004];
    let mut grad = [0f64; 4];
    let loss = CrossEntropy::new(1, 4).forward_backward(&logits, &[0i64], &mut grad)?;
    expect("f64: loss", loss, 1.387795);
    expect("f64: gradient at the target", grad[0], -0.750375);
    Ok(())
}

/// Logits of bfloat16 or half, as mixed precision has them, and a gradient of `f32`.
fn half_logits() -> Result<(), Error> {
    let bf16s = [1.0, 2.0, 0.5, 0.0].map(bf16::from_f32);
    let f16s = [1.0, 2.0, 0.5, 0.0].map(f16::from_f32);
    let mut grad = [0f32; 4];
    let call = CrossEntropy::new(1, 4);
    expect("bf16: loss", call.forward_backward(&bf16s, &[1u16], &mut grad)?, 0.546006);
    call.forward_backward(&f16s, &[1u16], &mut grad)?;
    expect("f16: gradient at the target, in f32", grad[1], -0.420741);
    Ok(())
}

/// Segmentation: logits [N, C, H, W] and targets [N, H, W] as they are, without a permute.
fn images() -> Result<(), Error> {
    let (n, classes, height, width) = (1, 3, 2, 2);
    let mut pixels = [2f32, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0];
    let labels = [0u8, 1, 2, 0];
    let call = CrossEntropy::new(n, classes).inner(height * width);
    let loss = call.forward_backward_in_place(&mut pixels, &labels)?;
    expect("images: loss", loss, 0.359339);
    expect("images: gradient of the first pixel", pixels[0], -0.053253);
    Ok(())
}

/// A matrix that has its classes first, [classes, rows]; the gradient in its place.
fn transposed() -> Result<(), Error> {
    let (rows, classes) = (2, 4);
    let mut columns = [0.1f32, 0.0, 0.2, 0.0, 0.3, 0.0, 0.4, 2.0];
    let in_place = Output::from(&mut columns).strides([1, rows as i64, 1]);
    let loss = CrossEntropy::new(rows, classes).forward_backward_in_place(in_place, &[0, 3])?;
    expect("transposed: loss", loss, 0.941644);
    expect("transposed: gradient at the second target", columns[7], -0.144383);

    // without a gradient, or with one elsewhere
    let columns = [0.1f32, 0.0, 0.2, 0.0, 0.3, 0.0, 0.4, 2.0];
    let logits = Input::from(&columns).strides([1, rows as i64, 1]);
    let loss = CrossEntropy::new(rows, classes).forward(logits, &[0, 3])?;
    expect("transposed: loss again", loss, 0.941644);
    Ok(())
}

/// Unequal classes, and rows that do not count: padding may hold anything.
fn class_weights() -> Result<(), Error> {
    let nan = f32::NAN;
    let logits = [0.1f32, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0, 2.0, nan, nan, nan, nan];
    let weights = [1f32, 2.0, 3.0, 4.0];
    let call = CrossEntropy::new(3, 4).class_weights(&weights).ignore_index(-1); // not -100
    expect("class weights, ignore_index: loss", call.forward(&logits, &[0, 3, -1])?, 0.581109);
    Ok(())
}

/// Sequences of unequal length by a mask, and a weight for each row that counts.
fn row_mask() -> Result<(), Error> {
    let nan = f32::NAN;
    let logits = [0.1f32, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0, 2.0, nan, nan, nan, nan];
    let targets = [0, 3, 12345]; // a masked target may be anything, too
    let call = CrossEntropy::new(3, 4).row_mask(&[1u8, 1, 0]).row_weights(&[1f32, 3.0, 1.0]);
    expect("row mask, row weights: loss", call.forward(&logits, &targets)?, 0.641199);
    Ok(())
}

/// Targets softened by a tenth, against overconfidence.
fn label_smoothing() -> Result<(), Error> {
    let logits = [0.1f32, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0, 2.0];
    let call = CrossEntropy::new(2, 4).label_smoothing(0.1);
    expect("label smoothing: loss", call.forward(&logits, &[0, 3])?, 1.009144);
    Ok(())
}

/// Distillation: the targets are a teacher's probabilities, at a temperature.
fn distillation() -> Result<(), Error> {
    let temperature = 2.0;
    let (logits, teacher) = ([0f32, 0.0, 0.0, 2.0], [0.1f32, 0.1, 0.1, 0.7]);
    let mut grad = [0f32; 4];
    let loss = CrossEntropy::new(1, 4)
        .logit_scale(1.0 / temperature)
        .grad_scale(temperature * temperature) // for the gradient alone
        .forward_backward(&logits, &teacher, &mut grad)?;
    expect("distillation: loss", temperature * temperature * loss, 4.174674);
    expect("distillation: gradient", grad[3], -0.449266);
    Ok(())
}

/// Distillation from the classes that a teacher thinks most of, as lists of them are stored.
fn sparse_targets() -> Result<(), Error> {
    let logits = [0.1f32, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1];
    let (classes, probabilities) = ([3, 0, 1, -100], [0.75f32, 0.25, 1.0, 0.0]); // -100: unused
    let mut grad = [0f32; 8];
    let call = CrossEntropy::new(2, 4).target_classes(&classes, 2);
    let loss = call.forward_backward(&logits, &probabilities, &mut grad)?;
    expect("sparse targets: loss", loss, 1.330036);
    expect("sparse targets: gradient", grad[3], -0.230674);
    Ok(())
}

/// Distillation from a teacher's logits at a temperature, and the divergence from it.
fn teacher_logits() -> Result<(), Error> {
    let temperature = 2.0;
    let logits = [0.1f32, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1];
    let teacher = [1f32, 2.0, 3.0, 4.0, 2.0, 2.0, 0.0, 0.0];
    let (mut loss, mut kl, mut grad) = (0.0, [0.0; 2], [0f32; 8]);
    let results =
        Results { loss: Some(&mut loss), kl: Some((&mut kl).into()), ..Results::default() };
    CrossEntropy::new(2, 4)
        .logit_scale(1.0 / temperature)
        .target_scale(1.0 / temperature)
        .forward_backward_with(&logits, &teacher, &mut grad, results)?;
    expect("teacher: loss", loss, 1.361689);
    expect("teacher: divergence of the first row", kl[0], 0.113577);
    expect("teacher: gradient", grad[0], 0.032509);
    Ok(())
}

/// The gradient that a teacher gets, or labels that are learned: -ln p of each class.
fn target_gradient() -> Result<(), Error> {
    let (logits, teacher) = ([0f32, 0.0, 0.0, 2.0], [0.1f32, 0.1, 0.1, 0.7]);
    let (mut lse, mut grad) = ([0.0; 1], [0f32; 4]);
    let call = CrossEntropy::new(1, 4);
    call.lse(&logits, &mut lse)?;
    call.backward_targets(&logits, &teacher, &lse, &mut grad)?;
    expect("gradient of the targets: the first", grad[0], 2.340753);
    Ok(())
}

/// NLLLoss: the model ends in log-probabilities, a mixture's for one.
fn nll_loss() -> Result<(), Error> {
    let log_probs = [0.5f32, 0.25, 0.25, 0.1, 0.1, 0.8].map(f32::ln);
    let mut grad = [0f32; 6];
    let call = CrossEntropy::new(2, 3).log_probs(true);
    expect("NLLLoss: loss", call.forward_backward(&log_probs, &[0, 2], &mut grad)?, 0.458145);
    expect("NLLLoss: gradient at the target", grad[0], -0.5);
    Ok(())
}

/// z-loss, which keeps lse near 0, and its part of the loss.
fn z_loss() -> Result<(), Error> {
    let (mut loss, mut part) = (0.0, 0.0);
    let results = Results { loss: Some(&mut loss), z_loss: Some(&mut part), ..Results::default() };
    let call = CrossEntropy::new(1, 4).z_loss(0.01);
    call.forward_with(&[0f32, 0.0, 0.0, 2.0], &[3], results)?;
    expect("z-loss: loss", loss, 0.395544);
    expect("z-loss: its part", part, 0.054791);
    Ok(())
}

/// An entropy bonus, as PPO and GRPO add to their losses, and its part of the loss.
fn entropy_bonus() -> Result<(), Error> {
    let (mut loss, mut part, mut grad) = (0.0, 0.0, [0f32; 4]);
    let results =
        Results { loss: Some(&mut loss), entropy_bonus: Some(&mut part), ..Results::default() };
    let call = CrossEntropy::new(1, 4).entropy_bonus(0.01);
    call.forward_backward_with(&[0f32, 0.0, 0.0, 2.0], &[3], &mut grad, results)?;
    expect("entropy bonus: loss", loss, 0.331570);
    expect("entropy bonus: its part", part, -0.009183);
    expect("entropy bonus: gradient at the target", grad[3], -0.284658);
    Ok(())
}

/// Micro-batches that add up to the batch: each gets the denominators of the whole.
fn gradient_accumulation() -> Result<(), Error> {
    let logits = [1f32, 2.0, 3.0, 0.0, 2.0, 0.0, 9.0, 9.0, 9.0, 3.0, 1.0, 0.0];
    let targets = [0, 1, -100, 2];
    let weights = [1f32, 2.0, 3.0];
    let (mut whole, mut parts) = ([0f32; 12], [0f32; 12]);
    let call = CrossEntropy::new(4, 3).class_weights(&weights).z_loss(0.01);
    let loss = call.forward_backward(&logits, &targets, &mut whole)?;

    let kept = targets.iter().filter(|&&target| target != -100);
    let z_normalizer = kept.clone().count() as f64;
    let normalizer = kept.map(|&target| f64::from(weights[target as usize])).sum(); // or the count
    let micro = CrossEntropy::new(2, 3)
        .class_weights(&weights)
        .z_loss(0.01)
        .normalizer(normalizer)
        .z_normalizer(z_normalizer);
    let mut sum = 0.0;
    for i in 0..2 {
        let of = i * 6..(i + 1) * 6;
        let (targets, grad) = (&targets[i * 2..(i + 1) * 2], &mut parts[of.clone()]);
        sum += micro.forward_backward(&logits[of], targets, grad)?;
    }
    let apart = whole.iter().zip(&parts).fold(0.0, |most, (a, b)| (a - b).abs().max(most));
    expect("gradient accumulation: sum of the losses", sum, loss);
    expect("gradient accumulation: gradients apart by", apart, 0.0);
    Ok(())
}

/// The head of a model like Gemma: scaled logits, kept within a cap.
fn softcap() -> Result<(), Error> {
    let mut logits = [100f32, 800.0, -1000.0, 0.0];
    let call = CrossEntropy::new(1, 4).logit_scale(1.0 / 16.0).softcap(30.0);
    let loss = call.forward_backward_in_place(&mut logits, &[0])?;
    expect("softcap, logit scale: loss", loss, 21.772168);
    expect("softcap, logit scale: gradient", logits[0], -0.059864);
    Ok(())
}

/// Perplexity and accuracy over batches, however many rows of each count.
fn evaluation() -> Result<(), Error> {
    let batches = [
        ([0.1f32, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0, 2.0], [0, 3]),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0], [-100, 3]),
    ];
    let (mut total, mut rows, mut hits) = (0.0, 0, 0);
    for (logits, targets) in &batches {
        let (mut loss, mut kept, mut correct) = (0.0, 0, 0);
        let results = Results {
            loss: Some(&mut loss),
            kept_rows: Some(&mut kept),
            correct: Some(&mut correct),
            ..Results::default()
        };
        let call = CrossEntropy::new(2, 4).reduction(Reduction::Sum);
        call.forward_with(logits, targets, results)?;
        (total, rows, hits) = (total + loss, rows + kept, hits + correct);
    }
    expect("evaluation: perplexity", (total / rows as f64).exp(), 2.098761);
    expect("evaluation: accuracy", hits as f64 / rows as f64, 2.0 / 3.0);
    Ok(())
}

/// What there is of each row, from one pass.
fn row_results() -> Result<(), Error> {
    let logits = [0.1f32, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0, 2.0];
    let (mut losses, mut entropy) = ([0f32; 2], [0f32; 2]);
    let (mut lse, mut argmax) = ([0.0; 2], [0; 2]);
    let results = Results {
        row_losses: Some((&mut losses).into()),
        entropy: Some((&mut entropy).into()),
        lse: Some(&mut lse),
        argmax: Some(&mut argmax),
        ..Results::default()
    };
    CrossEntropy::new(2, 4).forward_with(&logits, &[0, 3], results)?;
    expect("rows: loss of the second", losses[1], 0.340753);
    expect("rows: lse of the second", lse[1], 2.340753);
    expect("rows: entropy of the second", entropy[1], 0.918284);
    expect("rows: argmax of the second", argmax[1] as f64, 3.0);
    Ok(())
}

/// The two largest logits of each row with their log-probabilities, and how many classes come before the target.
fn top_k() -> Result<(), Error> {
    let logits = [0.1f32, 0.4, 0.3, 0.2, 0.0, 0.0, 0.0, 2.0];
    let (mut classes, mut ranks, mut log_probs) = ([0; 4], [0; 2], [0f32; 4]);
    let results = Results {
        top_count: 2,
        top_classes: Some(&mut classes),
        top_log_probs: Some((&mut log_probs).into()),
        target_ranks: Some(&mut ranks),
        ..Results::default()
    };
    CrossEntropy::new(2, 4).forward_with(&logits, &[3i32, 3], results)?;
    expect("top-k: second class of the first row", classes[1] as f64, 2.0);
    expect("top-k: its log-probability", log_probs[1], -1.342536);
    expect("top-k: rank of the target", ranks[0] as f64, 2.0);
    Ok(())
}

/// Without targets: what the model says, and how sure it is.
fn predictions() -> Result<(), Error> {
    let logits = [0.1f32, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0, 2.0];
    let (mut lse, mut argmax) = ([0.0; 2], [0; 2]);
    let results = Results { lse: Some(&mut lse), argmax: Some(&mut argmax), ..Results::default() };
    CrossEntropy::new(2, 4).evaluate(&logits, results)?;
    let largest = f64::from(logits[4 + argmax[1] as usize]);
    expect("predictions: class of the second row", argmax[1] as f64, 3.0);
    expect("predictions: its probability", (largest - lse[1]).exp(), 0.711235);
    Ok(())
}

/// Two losses on the same logits: 0.3 of the label's and 0.7 of the teacher's.
fn accumulate() -> Result<(), Error> {
    let (logits, teacher) = ([0f32, 0.0, 0.0, 2.0], [0.1f32, 0.1, 0.1, 0.7]);
    let mut grad = [0f32; 4];
    let label = CrossEntropy::new(1, 4).grad_scale(0.3);
    let distilled = CrossEntropy::new(1, 4).grad_scale(0.7).accumulate(true);
    label.forward_backward(&logits, &[3], &mut grad)?; // writes
    distilled.forward_backward(&logits, &teacher, &mut grad)?; // adds
    expect("accumulate: gradient of both", grad[3], -0.078765);
    Ok(())
}

/// A vocabulary of 3 in rows of 4, for the matrix products' sake: the gradient has 0 between its rows.
/// What follows the last row stays as it is.
fn padded_vocabulary() -> Result<(), Error> {
    let mut logits = [0.1f32, 0.2, 0.3, 9.0, 0.3, 0.2, 0.1, 9.0];
    let in_place = Output::from(&mut logits).strides([4, 1, 0]);
    CrossEntropy::new(2, 3).zero_padding(true).forward_backward_in_place(in_place, &[0, 2])?;
    logits[7] = 0.0;
    expect("padded vocabulary: gradient at the target", logits[0], -0.349695);
    expect("padded vocabulary: padding", logits[3], 0.0);
    Ok(())
}

/// A loss of one's own over the row losses (here the sum of their squares): its gradient comes back
/// as `grad_output`, one number a row.
fn per_row() -> Result<(), Error> {
    let (logits, targets) = ([0.1f32, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0, 2.0], [0, 3]);
    let (mut losses, mut lse, mut grad) = ([0f32; 2], [0.0; 2], [0f32; 8]);
    let results = Results {
        row_losses: Some((&mut losses).into()),
        lse: Some(&mut lse),
        ..Results::default()
    };
    let call = CrossEntropy::new(2, 4).reduction(Reduction::None);
    call.forward_with(&logits, &targets, results)?;
    let upstream = losses.map(|loss| 2.0 * loss);
    call.grad_output(&upstream).backward(&logits, &targets, &lse, &mut grad)?;
    expect("gradient for each row: at the first target", grad[0], -2.425365);
    Ok(())
}

/// Softmax over the axis in the middle of [A, B, C], and the gradient through it.
fn softmax_axis() -> Result<(), Error> {
    let (a, b, c) = (2, 3, 2);
    let mut x = [0f32, 5.0, 1.0, 5.0, 2.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    let mut grad = [0f32, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    let call = Softmax::new(a, b).inner(c);
    call.softmax_in_place(&mut x)?;
    expect("softmax over an axis", x[4], 0.665241);
    call.softmax_backward_in_place(&x, &mut grad)?;
    expect("softmax over an axis: gradient", grad[4], 0.222695);
    Ok(())
}

/// Log-softmax over the first axis of [A, B], and the gradient through it.
fn log_softmax_axis() -> Result<(), Error> {
    let (a, b) = (3, 2);
    let x = [0f32, 5.0, 1.0, 5.0, 2.0, 5.0];
    let upstream = [0f32, 0.0, 0.0, 0.0, 1.0, 0.0];
    let (mut logp, mut grad) = ([0f32; 6], [0f32; 6]);
    let call = Softmax::new(1, a).inner(b);
    call.log_softmax(&x, &mut logp)?;
    expect("log-softmax over an axis", logp[4], -0.407606);
    call.log_softmax_backward(&logp, &upstream, &mut grad)?;
    expect("log-softmax over an axis: gradient", grad[4], 0.334759);
    Ok(())
}

/// A vocabulary in shards, as blocks of one matrix here, or with processes and machines: the states of their
/// rows merge in any order into the results and the gradient of the whole.
fn shards() -> Result<(), Error> {
    let mut logits = [0.1f32, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1]; // [rows = 2, classes = 4]
    let targets = [0, 3];
    let mut merged = [Partial::EMPTY; 2];
    for (offset, classes) in [(0, 1), (1, 3)] {
        let mut partials = [Partial::EMPTY; 2];
        let columns = Input::from(&logits[offset..]).strides([4, 1, 0]);
        let shard = CrossEntropy::new(2, classes);
        shard.partial_forward(columns, &targets, offset, 4, &mut partials)?;
        Partial::merge_all(&mut merged, &partials);
    }
    let mut loss = 0.0;
    let results = Results { loss: Some(&mut loss), ..Results::default() };
    CrossEntropy::new(2, 4).partial_finish(&targets, 4, &merged, results)?;
    expect("shards: loss", loss, 1.542536);
    for (offset, classes) in [(0, 1), (1, 3)] {
        let in_place = Output::from(&mut logits[offset..]).strides([4, 1, 0]);
        let shard = CrossEntropy::new(2, classes);
        shard.partial_backward_in_place(in_place, &targets, offset, 4, &merged)?;
    }
    expect("shards: gradient at a target", logits[7], -0.393081);
    Ok(())
}

/// The calling thread alone, or threads apart from those of the process; the bits are the same.
fn threads() -> Result<(), Box<dyn std::error::Error>> {
    let (rows, classes) = (64, 4096);
    let logits: Vec<f32> = (0..rows * classes).map(|i| (i % 1009) as f32 / 100.0).collect();
    let targets = vec![0; rows];
    let call = CrossEntropy::new(rows, classes);
    let alone = call.threads(1).forward(&logits, &targets)?;
    let pool = Pool::new(2)?;
    let pooled = call.pool(&pool).forward(&logits, &targets)?;
    expect("threads and pool: same bits", f64::from(alone.to_bits() != pooled.to_bits()), 0.0);
    Ok(())
}

/// A linear layer and its loss: the logits (0.5, -0.5, 1.7) and (-0.15, 0.55, -0.35) are never stored.
fn linear_layer() -> Result<(), Error> {
    let hidden = [1f32, 2.0, 0.5, -1.0];
    let weight = [0.1f32, 0.2, 0.3, -0.4, 0.5, 0.6];
    let (mut grad_hidden, mut grad_weight) = ([0f32; 4], [0f32; 6]);
    let grads = LinearGrads {
        hidden: Some((&mut grad_hidden).into()),
        weight: Some((&mut grad_weight).into()),
        ..LinearGrads::default()
    };
    let layer = Linear::new(CrossEntropy::new(2, 3), 2);
    let loss = layer.forward_backward(&hidden, &weight, &[2i64, 0], grads)?;
    expect("linear layer: loss", loss, 0.844259);
    expect("linear layer: gradient of the weight", f64::from(grad_weight[0]), -0.078113);
    Ok(())
}

/// A failure says what was wrong, and has written nothing.
fn errors() {
    let mut logits = [0f32, 0.0, 0.0, 2.0];
    let error = CrossEntropy::new(1, 4).forward_backward_in_place(&mut logits, &[7]).unwrap_err();
    println!("{error}");
    assert_eq!(error, Error::Target { row: 0, place: None, value: 7, classes: 4 });
    expect("errors: the logits as before", logits[3], 2.0);
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    f64_logits()?;
    half_logits()?;
    images()?;
    transposed()?;
    class_weights()?;
    row_mask()?;
    label_smoothing()?;
    distillation()?;
    sparse_targets()?;
    teacher_logits()?;
    target_gradient()?;
    nll_loss()?;
    z_loss()?;
    entropy_bonus()?;
    gradient_accumulation()?;
    softcap()?;
    evaluation()?;
    row_results()?;
    top_k()?;
    predictions()?;
    accumulate()?;
    padded_vocabulary()?;
    per_row()?;
    softmax_axis()?;
    log_softmax_axis()?;
    shards()?;
    linear_layer()?;
    threads()?;
    errors();
    Ok(())
}
