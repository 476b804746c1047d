//! Random problems, biased to the sizes at which kernels change their way (blocks of 64 classes,
//! groups of 512, an initial shift from the first 256, chunks of 2048, segments of 65536) and to
//! logits that leave the exponent range of one shift.

use crate::{Indices, Problem, Reals, Reduction};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// SplitMix64.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform(0.0, 1.0)).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform(0.0, 1.0)).cos()
    }

    pub fn normals(&mut self, n: usize, deviation: f64) -> Vec<f32> {
        (0..n).map(|_| (self.normal() * deviation) as f32).collect()
    }

    /// A multiple of 1/8 in `[low, high]`, so that sums of weights and their products are exact,
    /// plus 2⁻³⁰ if `long`, which f64 holds and f32 does not.
    fn weight(&mut self, low: i64, high: i64, long: bool) -> f64 {
        let eighths = low + self.below((high - low + 1) as usize) as i64;
        let extra = if long && eighths != 0 { 2f64.powi(-30) } else { 0.0 };
        eighths as f64 / 8.0 + extra
    }

    fn weights(&mut self, n: usize, low: i64, high: i64, long: bool) -> Reals {
        if long {
            Reals::F64((0..n).map(|_| self.weight(low, high, true)).collect())
        } else {
            let weights = (0..n).map(|_| self.weight(low, high, false) as f32);
            Reals::F32(weights.collect())
        }
    }
}

/// A distribution of the logits of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Unit,
    Broad,
    Constant,
    Offset,
    Spike,
    Steps,
    Masked,
    LeadingInf,
    LeadingLow,
    Confident,
    Huge,
    NotFinite,
    AllInf,
    /// Every row has another of the kinds above.
    Mixed,
}

/// The finite ones first.
pub const KINDS: [Kind; 13] = [
    Kind::Unit,
    Kind::Broad,
    Kind::Constant,
    Kind::Offset,
    Kind::Spike,
    Kind::Steps,
    Kind::LeadingLow,
    Kind::Confident,
    Kind::Huge,
    Kind::Masked,
    Kind::LeadingInf,
    Kind::NotFinite,
    Kind::AllInf,
];

/// Fills a row; `y` is the class that a confident row predicts.
pub fn fill(row: &mut [f32], kind: Kind, y: usize, rng: &mut Rng) {
    let mut wide = vec![0.0; row.len()];
    fill_wide(&mut wide, kind, y, rng);
    for (x, wide) in row.iter_mut().zip(wide) {
        *x = wide as f32;
    }
}

/// As [`fill`], without rounding to f32.
pub fn fill_wide(row: &mut [f64], kind: Kind, y: usize, rng: &mut Rng) {
    let classes = row.len();
    let deviation = match kind {
        Kind::Broad => 5.0,
        Kind::Constant => 0.0,
        Kind::Huge => 10f64.powf(rng.uniform(6.0, 30.0)),
        _ => 1.0,
    };
    for x in row.iter_mut() {
        *x = rng.normal() * deviation;
    }
    match kind {
        Kind::Unit | Kind::Broad | Kind::Huge => {}
        Kind::Constant => {
            let sign = if rng.one_in(2) { 1.0 } else { -1.0 };
            row.fill(sign * 10f64.powf(rng.uniform(-3.0, 6.0)));
        }
        Kind::Offset => {
            let offset = if rng.one_in(2) { 1e4 } else { -1e4 };
            row.iter_mut().for_each(|x| *x += offset);
        }
        Kind::Spike => row[rng.below(classes)] = 10f64.powf(rng.uniform(1.0, 30.0)),
        Kind::Steps => {
            // Later classes lie far above the initial shift, or far below.
            let step = rng.uniform(-90.0, 90.0);
            let every = [64, 300, 2048][rng.below(3)];
            for (c, x) in row.iter_mut().enumerate() {
                *x += step * (c / every) as f64;
            }
        }
        Kind::Masked => {
            for x in row.iter_mut() {
                if rng.one_in(3) {
                    *x = f64::NEG_INFINITY;
                }
            }
        }
        Kind::LeadingInf | Kind::LeadingLow => {
            let lengths = [1, 63, 64, 65, 255, 256, 257, 512, 2048, 2049, 65_536];
            let length = lengths[rng.below(lengths.len())].min(classes - 1);
            let low = if kind == Kind::LeadingInf { f64::NEG_INFINITY } else { -1e9 };
            row[..length].fill(low);
            let level = rng.uniform(-100.0, 100.0);
            row[length..].iter_mut().for_each(|x| *x = *x * 10.0 + level);
        }
        Kind::Confident => row[y] += rng.uniform(5.0, 120.0),
        Kind::NotFinite => {
            let bad = [f64::NAN, f64::INFINITY];
            for _ in 0..1 + rng.below(3) {
                row[rng.below(classes)] = bad[rng.below(2)];
            }
        }
        Kind::AllInf => row.fill(f64::NEG_INFINITY),
        Kind::Mixed => {
            let kind = KINDS[rng.below(KINDS.len())];
            fill_wide(row, kind, y, rng);
        }
    }
}

/// The value of `ignore_index`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ignore {
    Nothing,
    Default,
    Outside(i64),
    /// A class in range.
    Inside,
}

/// The numbers from which a problem is generated; proptest can shrink them.
#[derive(Clone, Debug)]
pub struct Spec {
    pub seed: u64,
    pub classes: usize,
    pub rows: usize,
    pub kind: Kind,
    pub index_dtype: usize,
    pub ignore: Ignore,
    /// Weights: none, f32, f64.
    pub class_weights: u8,
    /// Some class weights are negative.
    pub signed: bool,
    pub row_weights: u8,
    pub mask: bool,
    pub smoothing: f64,
    pub reduction: u8,
    pub normalizer: f64,
    pub empty_is_zero: bool,
    pub grad_output: u8,
    pub grad_scale: f64,
    pub accumulate: bool,
    pub short_row_losses: bool,
    pub padding: usize,
    pub offset: usize,
    pub grad_padding: usize,
    pub grad_offset: usize,
}

fn classes() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 1usize..=20,
        3 => prop::sample::select(vec![
            63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 575, 1000,
        ]),
        2 => prop::sample::select(vec![2047, 2048, 2049, 2111, 4095, 4097, 6145, 10_000]),
        2 => 21usize..3000,
        1 => prop::sample::select(vec![65_535, 65_537, 70_000, 131_073]),
    ]
}

/// Random specs.
pub fn specs() -> impl Strategy<Value = Spec> {
    let shape = (
        any::<u64>(),
        classes(),
        1usize..=40,
        prop_oneof![3 => Just(Kind::Mixed), 4 => prop::sample::select(&KINDS[..])],
    );
    let rows = (
        0usize..5,
        prop_oneof![
            2 => Just(Ignore::Default),
            1 => Just(Ignore::Nothing),
            1 => prop::sample::select(vec![-1i64, 1 << 40, i64::MIN, 255, 65_535])
                .prop_map(Ignore::Outside),
            1 => Just(Ignore::Inside),
        ],
        0u8..3,
        any::<bool>(),
        0u8..3,
        prop::bool::weighted(0.3),
    );
    let options = (
        prop::sample::select(vec![0.0, 0.0, 0.1, 1.0]),
        0u8..3,
        prop::sample::select(vec![0.0, 0.0, 7.5]),
        any::<bool>(),
        0u8..3,
        prop::sample::select(vec![1.0, 1.0, -0.375, 1e-30, 1e30, 0.0, 65536.0]),
        prop::bool::weighted(0.25),
        any::<bool>(),
    );
    let layout = (
        prop_oneof![Just(0usize), 1usize..70],
        0usize..16,
        prop_oneof![Just(0usize), 1usize..70],
        0usize..16,
    );
    (shape, rows, options, layout).prop_map(|(shape, rows, options, layout)| Spec {
        seed: shape.0,
        classes: shape.1,
        rows: shape.2.min(1 + 30_000 / shape.1),
        kind: shape.3,
        index_dtype: rows.0,
        ignore: rows.1,
        class_weights: rows.2,
        signed: rows.3,
        row_weights: rows.4,
        mask: rows.5,
        smoothing: options.0,
        reduction: options.1,
        normalizer: options.2,
        empty_is_zero: options.3,
        grad_output: options.4,
        grad_scale: options.5,
        accumulate: options.6,
        short_row_losses: options.7,
        padding: layout.0,
        offset: layout.1,
        grad_padding: layout.2,
        grad_offset: layout.3,
    })
}

impl Spec {
    pub fn problem(&self) -> Problem {
        let mut rng = Rng::new(self.seed);
        let rng = &mut rng;
        let (rows, classes) = (self.rows, self.classes);
        let ignore_index = match self.ignore {
            Ignore::Nothing | Ignore::Default => -100,
            // If ignore_index is a class, that class still takes part in every softmax.
            Ignore::Outside(y) => y,
            Ignore::Inside => rng.below(classes) as i64,
        };
        let mut logits = vec![0.0; rows * classes];
        let mut targets = Vec::new();
        let mask: Option<Vec<u8>> =
            self.mask.then(|| (0..rows).map(|_| [0, 1, 255][rng.below(3)]).collect());
        for (i, row) in logits.chunks_mut(classes).enumerate() {
            let ends = [0, classes - 1, rng.below(classes)];
            let y = ends[rng.below(3)];
            fill(row, self.kind, y, rng);
            let ignored = self.ignore != Ignore::Nothing && rng.one_in(4);
            targets.push(if ignored {
                ignore_index
            } else if mask.as_ref().is_some_and(|mask| mask[i] == 0) && rng.one_in(2) {
                // A masked row may have any target.
                250
            } else {
                y as i64
            });
        }
        let long = |choice: u8| choice == 2;
        let (low, high) = if self.signed { (-16, 24) } else { (0, 32) };
        let class_weights = (self.class_weights > 0)
            .then(|| rng.weights(classes, low, high, long(self.class_weights)));
        let row_weights =
            (self.row_weights > 0).then(|| rng.weights(rows, 0, 24, long(self.row_weights)));
        let reduction =
            [Reduction::Mean, Reduction::Sum, Reduction::None][usize::from(self.reduction)];
        let upstream = if reduction == Reduction::None { rows } else { 1 };
        let grad_output =
            (self.grad_output > 0).then(|| rng.weights(upstream, -16, 16, long(self.grad_output)));
        let size = if self.grad_scale == 0.0 { 1.0 } else { self.grad_scale };
        let accumulate = self.accumulate.then(|| {
            let mut old = rng.normals(rows * classes, 0.1);
            old.iter_mut().for_each(|x| *x *= size as f32);
            old
        });
        Problem {
            rows,
            classes,
            logits,
            targets: Indices::narrow(&targets, self.index_dtype),
            class_weights,
            row_weights,
            row_mask: mask,
            ignore_index,
            label_smoothing: self.smoothing,
            reduction,
            normalizer: self.normalizer,
            empty_is_zero: self.empty_is_zero,
            grad_output,
            grad_scale: self.grad_scale,
            accumulate,
            short_row_losses: self.short_row_losses,
        }
    }

    pub fn how(&self, isa: xent::Isa) -> crate::How<'static> {
        crate::How {
            padding: self.padding,
            offset: self.offset,
            grad_padding: self.grad_padding,
            grad_offset: self.grad_offset,
            ..crate::How::on(isa)
        }
    }
}

/// Every run has the same cases, unless `PROPTEST_RNG_SEED` asks for others. `PROPTEST_CASES` asks for
/// more. A sample is the first 64th of them.
pub fn config(cases: u32) -> ProptestConfig {
    let set = |name: &str| std::env::var_os(name).is_some();
    let mut config = ProptestConfig {
        failure_persistence: None,
        max_shrink_iters: 400,
        ..ProptestConfig::default()
    };
    if !set("PROPTEST_CASES") {
        config.cases = if crate::is_sampled() { cases.div_ceil(64).max(2) } else { cases };
    }
    if !set("PROPTEST_RNG_SEED") {
        config.rng_seed = RngSeed::Fixed(0x7865_6e74);
    }
    config
}
