//! Numbers at which kernels change their way.

use crate::bytes::Bytes;

/// Classes: lanes along rows for few classes; blocks of 64 f32 and 32 f64, an initial shift from the first
/// 256, sums of 512, chunks of 2048.
pub const CLASSES: [usize; 48] = [
    3, 1, 2, 4, 5, 7, 8, 9, 10, 15, 16, 17, 20, 27, 30, 31, 32, 33, 34, 35, 47, 48, 49, 63, 64, 65,
    66, 95, 96, 97, 100, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300, 320, 383, 384, 385, 400,
    448, 449,
];

/// The same for larger problems.
pub const MANY_CLASSES: [usize; 20] = [
    511, 512, 513, 575, 576, 577, 639, 767, 768, 769, 1000, 1023, 1025, 2047, 2048, 2049, 2111,
    4095, 4096, 4097,
];

/// Rows and positions: tiles have 64, batches 8.
pub const ROWS: [usize; 24] =
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 66, 80, 127, 129, 140, 0];

pub const INNER: [usize; 16] = [1, 1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 63, 64, 65];

/// Rows of linear layers: products have 6, blocks 512, chains 256.
pub const LAYER_ROWS: [usize; 24] = [
    2, 1, 3, 4, 5, 6, 7, 11, 12, 13, 31, 63, 64, 65, 100, 128, 255, 256, 257, 300, 511, 513, 600, 0,
];

/// Features of linear layers: panels have 16 or 64, chains 256.
pub const FEATURES: [usize; 24] = [
    3, 1, 2, 4, 5, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 127, 129, 255, 256, 257, 300, 513,
];

const LOGITS: [f64; 72] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::NAN,
    0.5,
    10.0,
    -10.0,
    20.0,
    -20.0,
    // Where 1 - p of the target is an ulp of f32 and of f64, and beyond.
    16.7,
    -16.7,
    36.8,
    -36.8,
    // Where e^x leaves f32, normal or not, and f64.
    87.4,
    -87.4,
    88.8,
    -88.8,
    -103.98,
    104.0,
    709.8,
    -709.8,
    745.2,
    -745.2,
    // The safe range of a chunk's sum, 2^±60 and 2^±126.
    41.5,
    -41.5,
    41.6,
    -41.6,
    -42.0,
    42.0,
    100.0,
    -100.0,
    300.0,
    -300.0,
    // The end of integer shifts in f32 and f64.
    1.4e6,
    -1.4e6,
    1.46e6,
    -1.46e6,
    3e5,
    -3e5,
    1e4,
    -1e4,
    9e3,
    -9e3,
    1e8,
    -1e8,
    2.8e14,
    -2.8e14,
    1e16,
    -1e16,
    1e30,
    -1e30,
    f32::MAX as f64,
    f32::MIN as f64,
    1e38,
    -1e38,
    65504.0,
    -65504.0,
    1e300,
    -1e300,
    f64::MAX,
    f64::MIN,
    // Subnormal in f16, bf16 and f32, f64.
    6e-8,
    -6e-8,
    1e-40,
    -1e-40,
    1e-45,
    5e-324,
    -5e-324,
    f32::MIN_POSITIVE as f64,
];

/// A logit.
pub fn logit(bytes: &mut Bytes) -> f64 {
    match usize::from(bytes.byte()) {
        special if special < LOGITS.len() => LOGITS[special],
        // Eighths from -15 to 8 or so.
        other => (other as f64 - 192.0) / 8.0,
    }
}

/// An element of a hidden state, of a weight or of a bias.
pub fn factor(bytes: &mut Bytes) -> f64 {
    const FACTORS: [f64; 24] = [
        0.0,
        1.0,
        -1.0,
        0.5,
        -0.0,
        2.0,
        -2.0,
        f64::NEG_INFINITY,
        f64::INFINITY,
        f64::NAN,
        30.0,
        -30.0,
        100.0,
        -100.0,
        1e-3,
        1e-20,
        1e-40,
        -1e-45,
        1e4,
        -1e4,
        1e10,
        -1e20,
        1e20,
        3e38,
    ];
    match usize::from(bytes.byte()) {
        special if special < FACTORS.len() => FACTORS[special],
        // From -3.6 to 3.6 or so.
        other => (other as f64 - 140.0) / 32.0,
    }
}

/// Limits finite logits so that sums over classes are finite; docs/semantics.md promises nothing beyond.
/// f32 and halves are always within the limit.
pub fn keep_sums_finite(logits: &mut [f64]) {
    const MOST: f64 = 1e300;
    for x in logits.iter_mut().filter(|x| x.is_finite()) {
        *x = x.clamp(-MOST, MOST);
    }
}

/// A target probability, which need not be in [0, 1].
pub fn mass(bytes: &mut Bytes) -> f64 {
    const MASSES: [f64; 16] = [
        0.0, 1.0, 0.5, 0.25, 0.125, -0.0, 0.75, 2.0, -0.5, -1.0, 0.1, 1e-3, 1e-7, 1e-30,
        0.9990234375, 3.5,
    ];
    bytes.pick(&MASSES)
}

/// A weight: a multiple of 1/8, so that sums of weights and of their products are exact. A mean over a
/// denominator of nearly 0 depends on that.
pub fn weight(bytes: &mut Bytes, signed: bool) -> f64 {
    let eighths = i64::from(bytes.byte() % 33);
    // The first is 1.
    let weight = ((eighths + 8) % 33) as f64 / 8.0;
    if signed && eighths % 3 == 1 { -weight / 2.0 } else { weight }
}

/// A class: the first, the last, beside a border, or any.
pub fn class(bytes: &mut Bytes, classes: usize) -> usize {
    const BORDERS: [usize; 22] = [
        0, 1, 2, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 511, 512, 2047,
        2048,
    ];
    let code = usize::from(bytes.byte());
    match code {
        0..64 if code < BORDERS.len() => BORDERS[code].min(classes - 1),
        0..64 => classes - 1 - (code - BORDERS.len()).min(classes - 1),
        _ => (code - 64 + 192 * usize::from(bytes.byte())) % classes,
    }
}
