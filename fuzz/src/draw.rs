//! A valid problem from the bytes of an input. Shapes, layouts, dtypes, options and the contents of rows
//! are separate choices, so that the fuzzer can change one and keep the others.

use crate::bytes::Bytes;
use crate::values::{self, CLASSES, INNER, MANY_CLASSES, ROWS};
use common::Reduction;
use common::layer::{Layer, outputs};
use common::operand::{
    ANY_AXIS, AXES_OF_LOGITS, Dtype, FLOATS, INTEGERS, NO_AXIS, Operand, any_axis_if,
};
use common::random::Rng;
use common::task::{Task, Wants};

/// The largest problems.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Logits of most problems.
    pub usual: usize,
    /// Logits of one problem in sixteen.
    pub many: usize,
}

/// The logits of most layers, and their products.
const LAYER_LOGITS: usize = 3000;
const LAYER_PRODUCTS: usize = 60_000;

/// The kind of targets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TargetKind {
    Indices,
    Probabilities,
    /// Probabilities of listed classes.
    Sparse,
    Nothing,
}

/// The problem that the bytes ask for.
pub fn task(bytes: &mut Bytes, limits: Limits) -> Task {
    let sizes = shape(bytes, limits);
    task_of(bytes, sizes, |bytes, dtype, layout, spreads| {
        let mut values = by_rows(sizes, &mut rows_of(bytes, sizes[1], values::logit, &DEVIATIONS));
        if spreads {
            values::keep_sums_finite(&mut values);
        }
        lay_out(Operand::packed(dtype, sizes, &values), bytes, layout, AXES_OF_LOGITS)
    })
}

/// The linear layer that the bytes ask for.
pub fn layer(bytes: &mut Bytes) -> Layer {
    let classes = match bytes.byte() {
        code @ 0..224 => CLASSES[usize::from(code) % CLASSES.len()],
        code => [511, 512, 513, 600, 769, 1000][usize::from(code) % 6],
    };
    let rows = bytes.pick(&values::LAYER_ROWS).min((LAYER_LOGITS / classes).max(1));
    let most = LAYER_PRODUCTS / (rows.max(1) * classes);
    let features = bytes.pick(&values::FEATURES).min(most.max(1));
    let has_bias = bytes.flag();
    let asked = bytes.byte();
    let mut operands = None;
    let mut task = task_of(bytes, [rows, classes, 1], |bytes, dtype, layout, _| {
        let mut matrix = |rows: usize| {
            let sizes = [rows, features, 1];
            let mut kinds = rows_of(bytes, features, values::factor, &FACTOR_DEVIATIONS);
            let operand = Operand::packed(dtype, sizes, &by_rows(sizes, &mut kinds));
            lay_rows(operand, bytes, layout)
        };
        let (hidden, weight) = (matrix(rows), matrix(classes));
        let bias = has_bias.then(|| {
            let sizes = [1, classes, 1];
            let mut kinds = rows_of(bytes, classes, values::factor, &FACTOR_DEVIATIONS);
            let values = by_rows(sizes, &mut kinds);
            lay_out(Operand::packed(bytes.pick(&FLOATS), sizes, &values), bytes, layout, NO_AXIS)
        });
        let logits = outputs(&hidden, &weight, bias.as_ref());
        operands = Some((hidden, weight, bias, layout));
        logits
    });
    let (hidden, weight, bias, layout) = operands.expect("drawn with the logits");
    (task.log_probs, task.accumulate) = (false, false);
    let size = if task.grad_scale == 0.0 { 1.0 } else { task.grad_scale.abs().min(1e4) };
    let mut old = Rng::new(u64::from(asked));
    let mut grad = |bit: u8, sizes: [usize; 3], dtype: Dtype, bytes: &mut Bytes| {
        let values: Vec<f64> =
            (0..sizes.iter().product()).map(|_| cheap_normal(&mut old) * 0.1 * size).collect();
        let operand = Operand::packed(dtype, sizes, &values);
        let laid_out = match bit {
            4 => lay_out(operand, bytes, layout, NO_AXIS),
            _ => lay_rows(operand, bytes, layout),
        };
        (asked & bit == 0).then_some(laid_out)
    };
    let short = |bytes: &mut Bytes| if bytes.flag() { Dtype::F32 } else { hidden.dtype };
    let dtypes = [short(bytes), short(bytes), bytes.pick(&FLOATS)];
    let grads = [
        grad(1, [rows, features, 1], dtypes[0], bytes),
        grad(2, [classes, features, 1], dtypes[1], bytes),
        grad(4, [1, classes, 1], dtypes[2], bytes),
    ];
    Layer {
        task,
        features,
        hidden,
        weight,
        bias,
        grads,
        accumulates: [8, 16, 32].map(|bit| asked & bit != 0),
        workspace: 0,
        asks_lse: asked & 64 == 0,
    }
}

/// The problem over logits that `draw` makes of a dtype and a layout, and whether there are terms of all classes.
fn task_of(
    bytes: &mut Bytes,
    sizes: [usize; 3],
    draw: impl FnOnce(&mut Bytes, Dtype, u8, bool) -> Operand,
) -> Task {
    let [rows, classes, inner] = sizes;
    let by_row = [rows, 1, inner];
    let positions = rows * inner;

    let dtype = bytes.pick(&FLOATS);
    let long_grad = bytes.flag();
    let target_kind = bytes.pick(&[
        TargetKind::Indices,
        TargetKind::Indices,
        TargetKind::Indices,
        TargetKind::Probabilities,
        TargetKind::Sparse,
        TargetKind::Nothing,
    ]);
    let target_dtype = bytes.below(5);
    let log_probs = bytes.one_in(6);
    let label_smoothing = bytes.pick(&[0.0, 0.0, 0.1, 0.3, 1.0, 0.5, 1e-3]);
    let z_loss = bytes.pick(&[0.0, 0.0, 1e-4, 0.03, 2.0]);
    let softcap = bytes.pick(&[0.0, 0.0, 0.0, 30.0, 5.0, 0.5, 300.0]);
    let logit_scale = bytes.pick(&[1.0, 1.0, 1.0, 0.5, 0.7, 3.0, 1e-3]);
    let reduction = bytes.pick(&[Reduction::Sum, Reduction::Mean, Reduction::None]);
    let normalizer = bytes.pick(&[0.0, 0.0, 7.5]);
    let z_normalizer = bytes.pick(&[0.0, 0.0, 3.25]);
    let empty_is_zero = bytes.flag();
    let grad_scale = bytes.pick(&[1.0f64, 1.0, -0.375, 1e-30, 1e30, 0.0, 65536.0]);
    let accumulate = bytes.one_in(4);
    let asked = bytes.byte();
    let wants = Wants {
        entropy: asked & 1 == 0,
        argmax: asked & 2 == 0,
        correct: asked & 4 == 0,
        kl: asked & 8 == 0,
        top: asked & 8 == 0,
        ranks: asked & 16 == 0,
    };
    let top_count = [2, 1, 5, 64][usize::from(asked >> 5) % 4].min(classes);
    // Exact products, so that the oracle has the logits of the teacher that the kernels have.
    let is_teacher = asked & 0x30 == 0x30 && !log_probs && grad_scale != 0.0;
    let target_scale = if is_teacher { [1.0, 0.25][usize::from(asked >> 6 & 1)] } else { 0.0 };
    let short_results = bytes.flag();
    let ignore_index = match bytes.below(8) {
        0..3 => -100,
        3 => -1,
        4 => bytes.pick(&[1 << 40, i64::MIN, 255, 65_535]),
        // A class in range, if there is one.
        more => more as i64 - 5,
    };
    let layout = bytes.byte();
    let has_mask = bytes.one_in(4);
    let present = bytes.byte();

    let mask: Option<Vec<f64>> =
        has_mask.then(|| repeated(positions, bytes, |bytes| bytes.pick(&[1.0, 0.0, 255.0])));
    let masked = |i: usize| mask.as_ref().is_some_and(|mask| mask[i] == 0.0);

    let spreads = matches!(target_kind, TargetKind::Probabilities | TargetKind::Sparse)
        || label_smoothing > 0.0;
    let logits = draw(bytes, dtype, layout, spreads);

    let mut target_classes = None;
    let targets = match target_kind {
        TargetKind::Nothing => None,
        TargetKind::Sparse => {
            let places = 1 + bytes.below(9);
            let sizes = [rows, places, inner];
            let classes = repeated(positions * places, bytes, |bytes| match bytes.one_in(5) {
                true => ignore_index as f64,
                false => values::class(bytes, classes) as f64,
            });
            let dtype = dtype_of(target_dtype, &classes);
            let listed = Operand::packed(dtype, sizes, &classes);
            target_classes = Some(lay_out(listed, bytes, layout, NO_AXIS));
            let values = repeated(positions * places, bytes, values::mass);
            let values = Operand::packed(FLOATS[target_dtype % 4], sizes, &values);
            Some(lay_out(values, bytes, layout, NO_AXIS))
        }
        TargetKind::Indices => {
            let mut values = repeated(positions, bytes, |bytes| match bytes.one_in(5) {
                true => ignore_index as f64,
                // There are rows, so there are classes.
                false => values::class(bytes, classes) as f64,
            });
            for (i, y) in values.iter_mut().enumerate() {
                if masked(i) {
                    // A masked row may have any target.
                    *y = 250.0;
                }
            }
            let dtype = dtype_of(target_dtype, &values);
            Some(lay_out(
                Operand::packed(dtype, by_row, &values),
                bytes,
                layout,
                any_axis_if(mask.is_none()),
            ))
        }
        TargetKind::Probabilities => {
            let mut rows = rows_of(bytes, classes, values::mass, &[0.25, 0.0, 1.0]);
            rows.normalise = bytes.flag();
            let mut values = by_rows(sizes, &mut rows);
            for i in (0..positions).filter(|&i| masked(i)) {
                values[i / inner * classes * inner + i % inner] = f64::NAN;
            }
            let operand = Operand::packed(FLOATS[target_dtype % 4], sizes, &values);
            Some(lay_out(operand, bytes, layout, any_axis_if(mask.is_none())))
        }
    };

    let weights = |bit: u8, sizes: [usize; 3], bytes: &mut Bytes| {
        (present & bit != 0).then(|| {
            let dtype = bytes.pick(&FLOATS);
            let signed = bytes.one_in(3);
            let n = sizes.iter().product();
            let values = repeated(n, bytes, |bytes| values::weight(bytes, signed));
            Operand::packed(dtype, sizes, &values)
        })
    };
    let class_weights =
        weights(1, [1, classes, 1], bytes).map(|w| lay_out(w, bytes, layout, NO_AXIS));
    let row_weights = weights(2, by_row, bytes).map(|mut weights| {
        for i in (0..positions).filter(|&i| masked(i)) {
            weights.values[i] = f64::NAN;
        }
        lay_out(weights, bytes, layout, any_axis_if(mask.is_none()))
    });
    let upstream = if reduction == Reduction::None { by_row } else { [1; 3] };
    let grad_output =
        weights(4, upstream, bytes).map(|grad| lay_out(grad, bytes, layout, ANY_AXIS));
    let row_mask = mask.as_ref().map(|mask| {
        let mask = Operand::packed(Dtype::U8, by_row, mask);
        lay_out(mask, bytes, layout, NO_AXIS)
    });

    // The contents of the outputs that gradients are added to.
    let mut old = Rng::new(u64::from(bytes.byte()));
    let size = if grad_scale == 0.0 { 1.0 } else { grad_scale.abs().min(1e4) };
    let mut output = |dtype: Dtype, sizes: [usize; 3], holds: bool| {
        let mut operand = Operand::zeros(dtype, sizes);
        if holds && accumulate {
            operand.values.fill_with(|| dtype.round(cheap_normal(&mut old) * 0.1 * size));
        }
        lay_out(operand, bytes, layout, NO_AXIS)
    };
    let short = if short_results { Dtype::F32 } else { Dtype::F64 };
    let grad = output(if dtype.is_half() && long_grad { Dtype::F32 } else { dtype }, sizes, true);
    let [row_losses, entropy, kl] = [(); 3].map(|()| output(short, by_row, false));
    let top_log_probs = output(short, [rows, top_count, inner], false);
    let grad_targets = output(FLOATS[usize::from(present >> 4) % 4], sizes, true);
    // Drawn last, so that older seeds still make the same problems.
    let entropy_bonus = bytes.pick(&[0.0, 0.0, 0.0, 0.01, -0.5, 3.0]);
    Task {
        rows,
        classes,
        inner,
        logits,
        targets,
        class_weights,
        row_weights,
        row_mask,
        grad_output,
        ignore_index,
        label_smoothing,
        z_loss: if log_probs { 0.0 } else { z_loss },
        softcap: if log_probs { 0.0 } else { softcap },
        logit_scale: if log_probs { 1.0 } else { logit_scale },
        log_probs,
        reduction,
        normalizer,
        z_normalizer,
        empty_is_zero,
        grad_scale,
        entropy_bonus: if log_probs { 0.0 } else { entropy_bonus },
        accumulate,
        grad,
        grad_targets,
        row_losses,
        entropy,
        kl,
        top_log_probs,
        wants,
        target_scale: match target_kind {
            TargetKind::Probabilities | TargetKind::Sparse => target_scale,
            TargetKind::Indices | TargetKind::Nothing => 0.0,
        },
        target_classes,
    }
}

/// Rows, classes and positions of no more than so many logits.
fn shape(bytes: &mut Bytes, limits: Limits) -> [usize; 3] {
    let many = bytes.one_in(16);
    let limit = if many { limits.many } else { limits.usual };
    let classes = match bytes.byte() {
        code @ 0..192 if many => MANY_CLASSES[usize::from(code) % MANY_CLASSES.len()],
        code @ 0..192 => CLASSES[usize::from(code) % CLASSES.len()],
        192..255 => 1 + bytes.word() % limit,
        255 => limit,
    };
    let classes = classes.min(limit);
    let inner = bytes.pick(&INNER).min((limit / classes).max(1));
    let rows = bytes.pick(&ROWS).min((limit / (classes * inner)).max(1));
    [rows, classes, inner]
}

/// The first dtype from one on that holds class indices.
fn dtype_of(first: usize, indices: &[f64]) -> Dtype {
    let fits = |dtype: &&Dtype| indices.iter().all(|&y| holds(**dtype, y));
    *INTEGERS[first..].iter().find(fits).unwrap_or(&Dtype::I64)
}

fn holds(dtype: Dtype, y: f64) -> bool {
    match dtype {
        Dtype::U8 => (0.0..256.0).contains(&y),
        Dtype::U16 => (0.0..65_536.0).contains(&y),
        Dtype::U32 => (0.0..4_294_967_296.0).contains(&y),
        Dtype::I32 => y.abs() < 2_147_483_648.0,
        _ => true,
    }
}

/// `n` numbers: the first few are drawn one by one, and then repeat.
fn repeated(n: usize, bytes: &mut Bytes, mut draw: impl FnMut(&mut Bytes) -> f64) -> Vec<f64> {
    let period = (1 + bytes.below(9)).min(n.max(1));
    let drawn: Vec<f64> = (0..period).map(|_| draw(bytes)).collect();
    (0..n).map(|i| drawn[i % period]).collect()
}

/// The contents of a row, before some classes are replaced.
#[derive(Clone, Copy)]
enum Ground {
    Constant(f64),
    /// Normally distributed about a center.
    Noise {
        seed: u64,
        center: f64,
        deviation: f64,
    },
    /// The level changes every so many classes.
    Steps {
        from: f64,
        by: f64,
        every: usize,
    },
}

/// The contents of rows of logits.
const DEVIATIONS: [f64; 8] = [1.0, 0.0, 0.1, 5.0, 30.0, 1e3, 1e7, 1e20];

/// The contents of rows of hidden states and weights.
const FACTOR_DEVIATIONS: [f64; 8] = [1.0, 0.0, 0.1, 0.5, 2.0, 5.0, 30.0, 1e-3];

/// The bytes from which a row is generated.
struct Profile {
    ground: Ground,
    /// A range of classes, and their contents.
    patches: Vec<(usize, usize, f64)>,
}

/// Rows of a few kinds in turn.
struct Profiles {
    profiles: Vec<Profile>,
    normalise: bool,
}

fn rows_of(
    bytes: &mut Bytes,
    classes: usize,
    draw: fn(&mut Bytes) -> f64,
    deviations: &[f64],
) -> Profiles {
    let kinds = 1 + bytes.below(4);
    let profile = |bytes: &mut Bytes| {
        let ground = match bytes.below(4) {
            0 => Ground::Noise {
                seed: bytes.byte().into(),
                center: draw(bytes),
                deviation: bytes.pick(deviations),
            },
            1 => Ground::Constant(draw(bytes)),
            2 => Ground::Steps {
                from: draw(bytes),
                by: draw(bytes),
                every: bytes.pick(&[1, 32, 64, 256, 300, 512, 2048]),
            },
            _ => Ground::Constant(0.0),
        };
        let patches = (0..bytes.below(8))
            .map(|_| {
                let from = values::class(bytes, classes);
                let length = bytes.pick(&[1, 1, 1, 2, 15, 16, 31, 32, 33, 63, 64, 256, 2048]);
                (from, classes.min(from + length), draw(bytes))
            })
            .collect();
        Profile { ground, patches }
    };
    Profiles { profiles: (0..kinds).map(|_| profile(bytes)).collect(), normalise: false }
}

/// Row-major `[rows, classes, inner]`.
fn by_rows([rows, classes, inner]: [usize; 3], kinds: &mut Profiles) -> Vec<f64> {
    let mut values = vec![0.0; rows * classes * inner];
    let mut row = vec![0.0; classes];
    for i in 0..rows * inner {
        let turn = i / kinds.profiles.len();
        let profile = &kinds.profiles[i % kinds.profiles.len()];
        match profile.ground {
            Ground::Constant(x) => row.fill(x),
            Ground::Noise { seed, center, deviation } => {
                let mut rng = Rng::new(seed + (turn << 8) as u64);
                row.iter_mut().for_each(|x| *x = center + deviation * cheap_normal(&mut rng));
            }
            Ground::Steps { from, by, every } => {
                for (class, x) in row.iter_mut().enumerate() {
                    *x = from + by * (class / every) as f64;
                }
            }
        }
        for &(from, to, x) in &profile.patches {
            row[from..to].fill(x);
        }
        if kinds.normalise {
            let total: f64 = row.iter().map(|x| x.abs()).sum();
            if total > 0.0 {
                row.iter_mut().for_each(|x| *x = x.abs() / total);
            }
        }
        for (class, &x) in row.iter().enumerate() {
            values[(i / inner * classes + class) * inner + i % inner] = x;
        }
    }
    values
}

/// Approximately normally distributed.
fn cheap_normal(rng: &mut Rng) -> f64 {
    let bits = rng.bits();
    let parts = (0..4).map(|i| (bits >> (16 * i) & 0xffff) as f64 / 65_536.0);
    (parts.sum::<f64>() - 2.0) * 1.75
}

/// Where the elements lie: `layout` says how far operands are packed at all. Elements along one of the
/// `repeatable` axes may share an address.
fn lay_out(mut operand: Operand, bytes: &mut Bytes, layout: u8, repeatable: &[usize]) -> Operand {
    const ORDERS: [[usize; 3]; 6] =
        [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    const GAPS: [usize; 8] = [0, 0, 1, 2, 5, 31, 63, 64];
    let order = match layout % 4 {
        0 => return operand,
        // Classes last.
        1 => [0, 2, 1],
        2 => ORDERS[usize::from(layout >> 2) % ORDERS.len()],
        _ => bytes.pick(&ORDERS),
    };
    let close = layout % 4 == 1 || !bytes.one_in(5);
    let mut next = if close { 1 } else { 2 + bytes.below(2) };
    for axis in order.into_iter().rev() {
        if operand.sizes[axis] > 1 {
            operand.strides[axis] = next as i64;
            next = next * operand.sizes[axis] + bytes.pick(&GAPS);
        } else {
            // The stride of an axis of size 1 is ignored.
            operand.strides[axis] = bytes.pick(&[0, 1, -5, i64::MAX]);
        }
    }
    operand.offset = bytes.below(17);
    if !repeatable.is_empty() && bytes.one_in(6) {
        let axis = bytes.below(3);
        let others = (0..3).any(|other| other != axis && operand.sizes[other] > 1);
        if repeatable.contains(&axis) && operand.sizes[axis] > 1 && others {
            operand.strides[axis] = 0;
            repeat(&mut operand, axis);
        }
    }
    operand
}

/// Where the rows of a matrix lie, whose elements are side by side.
fn lay_rows(mut operand: Operand, bytes: &mut Bytes, layout: u8) -> Operand {
    if !layout.is_multiple_of(4) {
        let pitch = operand.sizes[1] + bytes.pick(&[0, 1, 3, 16, 31, 64]);
        operand.strides = [pitch as i64, 1, bytes.pick(&[0, 1, -5, i64::MAX])];
        operand.offset = bytes.below(17);
    }
    operand
}

/// Gives all elements along `axis` the value of the first.
fn repeat(operand: &mut Operand, axis: usize) {
    let [_, classes, inner] = operand.sizes;
    for i in 0..operand.values.len() {
        let mut at = [i / (classes * inner), i / inner % classes, i % inner];
        at[axis] = 0;
        operand.values[i] = operand.values[(at[0] * classes + at[1]) * inner + at[2]];
    }
}
