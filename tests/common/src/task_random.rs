//! Random [`Task`]s: every combination of options.

use crate::operand::{
    ANY_AXIS, AXES_OF_LOGITS, Dtype, FLOATS, INTEGERS, NO_AXIS, Operand, any_axis_if,
};
use crate::random::{Ignore, KINDS, Kind, Rng, fill_wide};
use crate::task::{Task, Wants};
use crate::{How, Reduction};
use proptest::prelude::*;
use xent::Isa;

/// The kind of targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetKind {
    Nothing,
    Indices,
    /// One class has a probability of 1.
    OneHot,
    Normalised,
    /// Not negative, of any sum.
    Any,
    Signed,
    /// Mostly 0.
    Sparse,
    Zero,
}

/// The layout of operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Packed,
    /// Classes are contiguous, also if there are inner positions.
    ClassesLast,
    /// Any strides; inputs may repeat elements.
    Any,
}

/// The numbers from which a task is generated; proptest can shrink them.
#[derive(Clone, Debug)]
pub struct Spec {
    pub seed: u64,
    pub rows: usize,
    pub classes: usize,
    pub inner: usize,
    pub dtype: Dtype,
    /// Gradients of halves in f32.
    pub long_grad: bool,
    pub kind: Kind,
    pub target_kind: TargetKind,
    /// The dtype of the targets: an index into either list.
    pub target_dtype: usize,
    pub ignore: Ignore,
    pub layout: Layout,
    pub class_weights: Option<Dtype>,
    pub row_weights: Option<Dtype>,
    pub grad_output: Option<Dtype>,
    /// Some weights are negative.
    pub signed: bool,
    pub mask: bool,
    pub smoothing: f64,
    pub z_loss: f64,
    pub softcap: f64,
    pub scale: f64,
    pub log_probs: bool,
    pub reduction: Reduction,
    pub normalizer: f64,
    pub z_normalizer: f64,
    pub empty_is_zero: bool,
    pub grad_scale: f64,
    pub entropy_bonus: f64,
    pub accumulate: bool,
    /// Places of sparse targets; 0 for targets of all classes.
    pub places: usize,
    /// Not 0: the targets are a teacher's logits.
    pub target_scale: f64,
    pub wants: Wants,
    /// Classes that are listed, or all if there are not so many.
    pub top: usize,
    pub short_results: bool,
    pub threads: u32,
}

fn classes() -> impl Strategy<Value = usize> {
    prop_oneof![
        16 => 1usize..=31,
        12 => prop::sample::select(vec![31, 32, 33, 34, 63, 64, 65, 96, 97, 127, 128, 129]),
        12 => prop::sample::select(vec![127, 128, 129, 255, 256, 257, 511, 513, 575, 1000]),
        8 => prop::sample::select(vec![2047, 2048, 2049, 2111, 4095, 4096, 4097, 6145]),
        8 => 34usize..2000,
        1 => prop::sample::select(vec![65_535, 65_537, 70_000, 131_073]),
    ]
}

fn optional() -> impl Strategy<Value = Option<Dtype>> {
    prop_oneof![
        3 => Just(None),
        4 => prop::sample::select(&FLOATS[..]).prop_map(Some),
    ]
}

/// Random specs of at most about `elements` logits.
pub fn tasks(elements: usize) -> impl Strategy<Value = Spec> {
    let shape = (
        any::<u64>(),
        (prop_oneof![3 => 1usize..=12, 2 => 13usize..=140], classes()),
        prop_oneof![4 => Just(1usize), 2 => 2usize..=9, 1 => 10usize..=140],
        (
            prop::sample::select(
                &[Dtype::F32, Dtype::F32, Dtype::F64, Dtype::Bf16, Dtype::F16][..],
            ),
            any::<bool>(),
        ),
        prop_oneof![3 => Just(Kind::Mixed), 2 => Just(Kind::Unit), 4 => prop::sample::select(&KINDS[..])],
        prop_oneof![2 => Just(Layout::Packed), 2 => Just(Layout::ClassesLast), 3 => Just(Layout::Any)],
    );
    let targets = (
        prop_oneof![
            1 => Just(TargetKind::Nothing),
            8 => Just(TargetKind::Indices),
            7 => prop::sample::select(
                vec![TargetKind::OneHot, TargetKind::Normalised, TargetKind::Any, TargetKind::Signed, TargetKind::Sparse, TargetKind::Zero]
            ),
        ],
        0usize..5,
        prop_oneof![
            2 => Just(Ignore::Default),
            2 => Just(Ignore::Nothing),
            1 => prop::sample::select(vec![-1i64, 1 << 40, i64::MIN, 255, 65_535])
                .prop_map(Ignore::Outside),
            1 => Just(Ignore::Inside),
        ],
        (optional(), optional(), optional()),
        any::<bool>(),
        prop::bool::weighted(0.3),
        prop_oneof![2 => Just(0usize), 1 => 1usize..=9],
        prop::sample::select(vec![0.0, 0.0, 1.0, 0.5, 4.0]),
    );
    let loss = (
        prop::sample::select(vec![0.0, 0.0, 0.1, 0.3, 1.0]),
        prop::sample::select(vec![0.0, 0.0, 1e-4, 0.03, 2.0]),
        prop::sample::select(vec![0.0, 0.0, 0.0, 30.0, 5.0, 0.5, 300.0]),
        prop::sample::select(vec![1.0, 1.0, 1.0, 0.5, 0.7, 3.0, 1e-3]),
        prop::bool::weighted(0.2),
        prop::sample::select(vec![0.0, 0.0, 0.0, 0.01, -0.5, 3.0]),
    );
    let options = (
        prop::sample::select(vec![Reduction::Sum, Reduction::Mean, Reduction::None]),
        prop::sample::select(vec![0.0, 0.0, 7.5]),
        prop::sample::select(vec![0.0, 0.0, 3.25]),
        any::<bool>(),
        prop::sample::select(vec![1.0, 1.0, 1.0, -0.375, 1e-30, 1e30, 0.0, 65536.0]),
        prop::bool::weighted(0.25),
        (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()),
        any::<bool>(),
        1u32..=3,
        prop_oneof![1 => Just(1usize), 3 => 2usize..=9, 1 => 10usize..=64, 1 => Just(64)],
    );
    (shape, targets, loss, options).prop_map(move |(shape, targets, loss, options)| {
        let (rows, classes) = shape.1;
        let inner = shape.2.min((elements / classes).max(1));
        let neutral = loss.4;
        let (entropy, argmax, correct, kl, top, ranks) = options.6;
        Spec {
            seed: shape.0,
            rows: rows.min((elements / (classes * inner)).max(1)),
            classes,
            inner,
            dtype: shape.3.0,
            long_grad: shape.3.1,
            kind: shape.4,
            layout: shape.5,
            target_kind: targets.0,
            target_dtype: targets.1,
            ignore: targets.2,
            class_weights: targets.3.0,
            row_weights: targets.3.1,
            grad_output: targets.3.2,
            signed: targets.4,
            mask: targets.5,
            smoothing: loss.0,
            z_loss: if neutral { 0.0 } else { loss.1 },
            softcap: if neutral { 0.0 } else { loss.2 },
            scale: if neutral { 1.0 } else { loss.3 },
            log_probs: loss.4,
            reduction: options.0,
            normalizer: options.1,
            z_normalizer: options.2,
            empty_is_zero: options.3,
            grad_scale: options.4,
            entropy_bonus: if neutral { 0.0 } else { loss.5 },
            accumulate: options.5,
            places: targets.6,
            target_scale: targets.7,
            wants: Wants { entropy, argmax, correct, kl, top, ranks },
            top: options.9,
            short_results: options.7,
            threads: options.8,
        }
    })
}

/// Multiples of 1/8, so that sums of weights and of their products are exact. In f64 2⁻²⁰ is added,
/// which an f32 cannot hold.
fn weights(rng: &mut Rng, dtype: Dtype, sizes: [usize; 3], low: i64, high: i64) -> Operand {
    let n = sizes.iter().product();
    let values: Vec<f64> = (0..n)
        .map(|_| {
            let eighths = low + rng.below((high - low + 1) as usize) as i64;
            let more = if dtype == Dtype::F64 && eighths != 0 { 2f64.powi(-20) } else { 0.0 };
            eighths as f64 / 8.0 + more
        })
        .collect();
    Operand::packed(dtype, sizes, &values)
}

/// Fills a row of a teacher's logits, which may have no softmax if `may_be_odd`.
fn fill_teacher(row: &mut [f64], may_be_odd: bool, rng: &mut Rng) {
    let (sharp, at) = (rng.uniform(0.0, 5.0), rng.normal() * 20.0);
    for y in row.iter_mut() {
        *y = if may_be_odd && rng.one_in(10) {
            f64::NEG_INFINITY
        } else {
            at + rng.normal() * sharp
        };
    }
    if may_be_odd && rng.one_in(40) {
        let odd = [f64::NAN, f64::INFINITY][rng.below(2)];
        let at = rng.below(row.len());
        row[at] = odd;
    }
}

impl Spec {
    fn lay_out(&self, operand: Operand, rng: &mut Rng, repeatable: &[usize]) -> Operand {
        let [rows, classes, inner] = operand.sizes;
        match self.layout {
            Layout::Packed => operand,
            Layout::ClassesLast if classes > 1 => {
                let pitch = classes + if rng.one_in(2) { rng.below(70) } else { 0 };
                let strides = [(pitch * inner) as i64, 1, pitch as i64];
                let offset = rng.below(17);
                assert!(rows > 0);
                Operand { strides, offset, ..operand }
            }
            _ => operand.laid_out(rng, repeatable),
        }
    }

    /// Row-major `[rows, classes, inner]` from rows that are filled one by one.
    fn by_rows(&self, mut fill: impl FnMut(usize, &mut [f64])) -> Vec<f64> {
        let (classes, inner) = (self.classes, self.inner);
        let mut values = vec![0.0; self.rows * classes * inner];
        let mut row = vec![0.0; classes];
        for i in 0..self.rows * inner {
            row.fill(0.0);
            fill(i, &mut row);
            for (class, &x) in row.iter().enumerate() {
                values[(i / inner * classes + class) * inner + i % inner] = x;
            }
        }
        values
    }

    pub fn task(&self) -> Task {
        let mut rng = Rng::new(self.seed);
        let rng = &mut rng;
        let Spec { rows, classes, inner, dtype, .. } = *self;
        let (full, by_row) = ([rows, classes, inner], [rows, 1, inner]);
        let positions = rows * inner;
        let mask: Option<Vec<f64>> =
            self.mask.then(|| (0..positions).map(|_| [0.0, 1.0, 255.0][rng.below(3)]).collect());
        let is_masked = |i: usize| mask.as_ref().is_some_and(|mask| mask[i] == 0.0);

        // For each row a class that may be its target, and that a confident row predicts.
        let chosen: Vec<usize> =
            (0..positions).map(|_| [0, classes - 1, rng.below(classes)][rng.below(3)]).collect();
        let logits = self.by_rows(|i, row| {
            fill_wide(row, self.kind, chosen[i], rng);
            if dtype == Dtype::F16 {
                // A logit that overflows would mostly be one more kind of infinity.
                row.iter_mut().filter(|x| x.is_finite()).for_each(|x| *x = x.clamp(-6e4, 6e4));
            }
            if self.log_probs && rng.one_in(2) {
                row.iter_mut().for_each(|x| *x = -x.abs());
            }
        });
        let mut logits = Operand::packed(dtype, full, &logits);
        logits = self.lay_out(logits, rng, AXES_OF_LOGITS);

        let ignore_index = match self.ignore {
            Ignore::Nothing | Ignore::Default => -100,
            // If ignore_index is a class, that class still takes part in every softmax.
            Ignore::Outside(y) => y,
            Ignore::Inside => rng.below(classes) as i64,
        };
        let mut target_classes = None;
        let targets = match self.target_kind {
            TargetKind::Nothing => None,
            TargetKind::Indices => {
                let values: Vec<f64> = (0..positions)
                    .map(|i| {
                        if self.ignore != Ignore::Nothing && rng.one_in(4) {
                            ignore_index as f64
                        } else if is_masked(i) && rng.one_in(2) {
                            // A masked row may have any target.
                            250.0
                        } else {
                            chosen[i] as f64
                        }
                    })
                    .collect();
                let operand = Operand::packed(self.dtype_of(&values), by_row, &values);
                Some(self.lay_targets(operand, &mask, rng))
            }
            _ => {
                let dtype = FLOATS[self.target_dtype % 4];
                if self.places > 0 {
                    let [classes, values] = self.sparse_targets(is_masked, ignore_index, rng);
                    let sizes = [rows, self.places, inner];
                    let classes = Operand::packed(self.dtype_of(&classes), sizes, &classes);
                    target_classes = Some(self.lay_places(classes, rng));
                    let values = Operand::packed(dtype, sizes, &values);
                    Some(self.lay_places(values, rng))
                } else {
                    let values = self.by_rows(|i, row| {
                        if self.target_scale > 0.0 {
                            fill_teacher(row, self.shows_odd_targets(), rng);
                        } else {
                            self.fill_probabilities(row, chosen[i], rng);
                        }
                        if is_masked(i) || (self.smoothing == 1.0 && rng.one_in(4)) {
                            // Values that xent does not read, or multiplies by 0.
                            row[rng.below(classes)] = [f64::NAN, f64::INFINITY][rng.below(2)];
                        }
                    });
                    let operand = Operand::packed(dtype, full, &values);
                    Some(self.lay_targets(operand, &mask, rng))
                }
            }
        };

        let (low, high) = if self.signed { (-16, 24) } else { (0, 32) };
        let class_weights = self.class_weights.map(|dtype| {
            let operand = weights(rng, dtype, [1, classes, 1], low, high);
            self.lay_out(operand, rng, NO_AXIS)
        });
        let low = if self.signed { -4 } else { 0 };
        let row_weights = self.row_weights.map(|dtype| {
            let mut operand = weights(rng, dtype, by_row, low, 24);
            for (i, r) in operand.values.iter_mut().enumerate() {
                if is_masked(i) {
                    *r = f64::NAN;
                }
            }
            self.lay_out(operand, rng, any_axis_if(mask.is_none()))
        });
        let grad_output = self.grad_output.map(|dtype| {
            let each = self.reduction == Reduction::None;
            let operand = weights(rng, dtype, if each { by_row } else { [1; 3] }, -16, 16);
            self.lay_out(operand, rng, ANY_AXIS)
        });
        let row_mask = mask.map(|mask| {
            let operand = Operand::packed(Dtype::U8, by_row, &mask);
            self.lay_out(operand, rng, NO_AXIS)
        });

        let size = if self.grad_scale == 0.0 { 1.0 } else { self.grad_scale };
        let size = size.abs().min(1e4);
        let mut olds = |dtype: Dtype| {
            let old: Vec<f64> =
                (0..positions * classes).map(|_| rng.normal() * 0.1 * size).collect();
            Operand::packed(dtype, full, &old)
        };
        let grad_dtype = if dtype.is_half() && self.long_grad { Dtype::F32 } else { dtype };
        let grads = [olds(grad_dtype), olds(FLOATS[(self.seed % 4) as usize])];
        let result = |dtype| Operand::zeros(dtype, by_row);
        let short = if self.short_results { Dtype::F32 } else { Dtype::F64 };
        let top = Operand::zeros(short, [rows, self.top.min(classes), inner]);
        let outputs = [result(short), result(short), result(short), top];
        let [grad, grad_targets] = grads.map(|operand| self.lay_out(operand, rng, NO_AXIS));
        let [row_losses, entropy, kl, top_log_probs] =
            outputs.map(|operand| self.lay_out(operand, rng, NO_AXIS));
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
            label_smoothing: self.smoothing,
            z_loss: self.z_loss,
            softcap: self.softcap,
            logit_scale: self.scale,
            log_probs: self.log_probs,
            reduction: self.reduction,
            normalizer: self.normalizer,
            z_normalizer: self.z_normalizer,
            empty_is_zero: self.empty_is_zero,
            grad_scale: self.grad_scale,
            entropy_bonus: self.entropy_bonus,
            accumulate: self.accumulate,
            grad,
            grad_targets,
            row_losses,
            entropy,
            kl,
            top_log_probs,
            wants: self.wants,
            target_scale: if matches!(self.target_kind, TargetKind::Nothing | TargetKind::Indices) {
                0.0
            } else {
                self.target_scale
            },
            target_classes,
        }
    }

    /// No factor of 0 hides a target of NaN from a gradient.
    fn shows_odd_targets(&self) -> bool {
        !self.log_probs && self.grad_scale != 0.0 && self.grad_output.is_none()
    }

    /// The first dtype from the spec's on that holds class indices.
    fn dtype_of(&self, indices: &[f64]) -> Dtype {
        let holds = |dtype: Dtype, y: f64| match dtype {
            Dtype::U8 => (0.0..256.0).contains(&y),
            Dtype::U16 => (0.0..65_536.0).contains(&y),
            Dtype::U32 => (0.0..4_294_967_296.0).contains(&y),
            Dtype::I32 => y.abs() < 2_147_483_648.0,
            _ => true,
        };
        let fits = |dtype: &&Dtype| indices.iter().all(|&y| holds(**dtype, y));
        *INTEGERS[self.target_dtype..].iter().find(fits).expect("i64 holds all")
    }

    /// Classes and values of sparse targets, `[rows, places, inner]`. Some classes are listed twice, and some places are
    /// unused.
    fn sparse_targets(
        &self,
        is_masked: impl Fn(usize) -> bool,
        ignore_index: i64,
        rng: &mut Rng,
    ) -> [Vec<f64>; 2] {
        let (places, inner) = (self.places, self.inner);
        let mut lists = [(); 2].map(|()| vec![0.0; self.rows * places * inner]);
        for i in 0..self.rows * inner {
            let [mut classes, mut values] = [(); 2].map(|()| vec![0.0; places]);
            for class in &mut classes {
                *class = [0, self.classes - 1, rng.below(self.classes)][rng.below(3)] as f64;
            }
            if self.target_scale > 0.0 {
                fill_teacher(&mut values, self.shows_odd_targets(), rng);
            } else {
                values.iter_mut().for_each(|t| *t = rng.uniform(0.0, 1.0));
                if matches!(self.target_kind, TargetKind::Signed | TargetKind::Sparse) {
                    values.iter_mut().for_each(|t| *t -= 0.4);
                }
            }
            for place in 0..places {
                if is_masked(i) && rng.one_in(2) {
                    classes[place] = 250.0;
                } else if rng.one_in(5) {
                    classes[place] = ignore_index as f64;
                    values[place] = [f64::NAN, f64::INFINITY, 0.5][rng.below(3)];
                }
                let at = (i / inner * places + place) * inner + i % inner;
                (lists[0][at], lists[1][at]) = (classes[place], values[place]);
            }
        }
        lists
    }

    /// Lays out a list of places, whose elements do not repeat: those of unused places have any value.
    fn lay_places(&self, operand: Operand, rng: &mut Rng) -> Operand {
        match self.layout {
            Layout::Any => operand.laid_out(rng, NO_AXIS),
            Layout::Packed | Layout::ClassesLast => operand,
        }
    }

    /// Elements may repeat, unless a masked row's element could become another row's.
    fn lay_targets(&self, operand: Operand, mask: &Option<Vec<f64>>, rng: &mut Rng) -> Operand {
        self.lay_out(operand, rng, any_axis_if(mask.is_none()))
    }

    /// Fills a row of probabilities.
    fn fill_probabilities(&self, row: &mut [f64], y: usize, rng: &mut Rng) {
        match self.target_kind {
            TargetKind::OneHot => row[y] = 1.0,
            TargetKind::Normalised => {
                let sharp = rng.uniform(0.0, 4.0);
                row.iter_mut().for_each(|t| *t = (rng.normal() * sharp).exp());
                let total: f64 = row.iter().sum();
                row.iter_mut().for_each(|t| *t /= total);
            }
            TargetKind::Any => row.iter_mut().for_each(|t| *t = rng.uniform(0.0, 2.0)),
            TargetKind::Signed => row.iter_mut().for_each(|t| *t = rng.normal()),
            TargetKind::Sparse => {
                for _ in 0..3 {
                    row[rng.below(self.classes)] = rng.uniform(-0.5, 1.0);
                }
            }
            TargetKind::Zero | TargetKind::Nothing | TargetKind::Indices => {}
        }
    }

    pub fn how(&self, isa: Isa) -> How<'static> {
        How { threads: self.threads, ..How::on(isa) }
    }
}
