//! Reads the files that generate.py writes; it documents their format.

#![allow(dead_code, reason = "every test binary uses its own part")]

use common::layer::Layer;
use common::operand::{Dtype, Operand};
use common::reference::{self, Reduction, Targets};
use common::task::Task;
use std::collections::HashMap;
use std::rc::Rc;
use xent::half::{bf16, f16};
use xent::{Input, Output};

/// A file's name and contents.
pub type Source = (&'static str, &'static str);
pub const INDEX: Source = ("index.txt", include_str!("index.txt"));
pub const SOFT: Source = ("soft.txt", include_str!("soft.txt"));
pub const NLL: Source = ("nll.txt", include_str!("nll.txt"));
pub const SOFTMAX: Source = ("softmax.txt", include_str!("softmax.txt"));
pub const COMPOSED: Source = ("composed.txt", include_str!("composed.txt"));
pub const BONUS: Source = ("bonus.txt", include_str!("bonus.txt"));
pub const DISTILLATION: Source = ("distillation.txt", include_str!("distillation.txt"));
pub const INTRO: Source = ("intro.txt", include_str!("intro.txt"));
pub const LINEAR: Source = ("linear.txt", include_str!("linear.txt"));

/// Elements in their stored dtype.
#[derive(Clone, Debug, PartialEq)]
pub enum Tensor {
    F64(Vec<f64>),
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    I64(Vec<i64>),
    U8(Vec<u8>),
}

/// Evaluates an expression for a vector of any type.
macro_rules! with {
    ($tensor:expr, $data:ident => $body:expr) => {
        match $tensor {
            Tensor::F64($data) => $body,
            Tensor::F32($data) => $body,
            Tensor::Bf16($data) => $body,
            Tensor::F16($data) => $body,
            Tensor::I64($data) => $body,
            Tensor::U8($data) => $body,
        }
    };
}

/// Evaluates an expression for a vector of any type and makes a tensor of the result.
macro_rules! map {
    ($tensor:expr, $data:ident => $body:expr) => {
        match $tensor {
            Tensor::F64($data) => Tensor::F64($body),
            Tensor::F32($data) => Tensor::F32($body),
            Tensor::Bf16($data) => Tensor::Bf16($body),
            Tensor::F16($data) => Tensor::F16($body),
            Tensor::I64($data) => Tensor::I64($body),
            Tensor::U8($data) => Tensor::U8($body),
        }
    };
}

impl Tensor {
    fn parse(dtype: &str, data: &str) -> Tensor {
        if dtype == "i64" {
            let numbers = data.split(',').filter(|number| *number != "-");
            return Tensor::I64(numbers.map(|number| number.parse().unwrap()).collect());
        }
        let bytes = if data == "-" { Vec::new() } else { base64(data) };
        fn elements<T, const N: usize>(bytes: &[u8], from: fn([u8; N]) -> T) -> Vec<T> {
            let (elements, rest) = bytes.as_chunks::<N>();
            assert!(rest.is_empty());
            elements.iter().map(|bytes| from(*bytes)).collect()
        }
        match dtype {
            "f64" => Tensor::F64(elements(&bytes, f64::from_le_bytes)),
            "f32" => Tensor::F32(elements(&bytes, f32::from_le_bytes)),
            "bf16" => Tensor::Bf16(elements(&bytes, bf16::from_le_bytes)),
            "f16" => Tensor::F16(elements(&bytes, f16::from_le_bytes)),
            _ => panic!("dtype {dtype}"),
        }
    }

    pub fn len(&self) -> usize {
        with!(self, data => data.len())
    }

    pub fn is_float(&self) -> bool {
        !matches!(self, Tensor::I64(_) | Tensor::U8(_))
    }

    pub fn to_f64(&self) -> Vec<f64> {
        match self {
            Tensor::F64(data) => data.clone(),
            Tensor::F32(data) => data.iter().map(|&x| x.into()).collect(),
            Tensor::Bf16(data) => data.iter().map(|x| x.to_f64()).collect(),
            Tensor::F16(data) => data.iter().map(|x| x.to_f64()).collect(),
            Tensor::I64(data) => data.iter().map(|&x| x as f64).collect(),
            Tensor::U8(data) => data.iter().map(|&x| x.into()).collect(),
        }
    }

    pub fn to_i64(&self) -> Vec<i64> {
        match self {
            Tensor::I64(data) => data.clone(),
            _ => panic!("not integers"),
        }
    }

    /// `[rows, classes, inner]` with the last two axes exchanged.
    pub fn exchanged(&self, [rows, classes, inner]: [usize; 3]) -> Tensor {
        assert_eq!(self.len(), rows * classes * inner);
        let from = |i: usize| {
            let (row, k, class) = (i / (inner * classes), i / classes % inner, i % classes);
            (row * classes + class) * inner + k
        };
        map!(self, data => (0..data.len()).map(|i| data[from(i)]).collect())
    }

    /// A tensor of the same length and dtype, of NaN or −1: an output that a call must overwrite.
    pub fn poisoned(&self) -> Tensor {
        let n = self.len();
        match self {
            Tensor::F64(_) => Tensor::F64(vec![f64::from_bits(0x7ff8_0000_dead_dead); n]),
            Tensor::F32(_) => Tensor::F32(vec![f32::from_bits(0x7fc0_dead); n]),
            Tensor::Bf16(_) => Tensor::Bf16(vec![bf16::from_bits(0x7fde); n]),
            Tensor::F16(_) => Tensor::F16(vec![f16::from_bits(0x7ead); n]),
            Tensor::I64(_) => Tensor::I64(vec![-1; n]),
            Tensor::U8(_) => Tensor::U8(vec![0xff; n]),
        }
    }

    /// The operand of these elements.
    pub fn operand(&self, sizes: [usize; 3]) -> Operand {
        let dtype = match self {
            Tensor::F64(_) => Dtype::F64,
            Tensor::F32(_) => Dtype::F32,
            Tensor::Bf16(_) => Dtype::Bf16,
            Tensor::F16(_) => Dtype::F16,
            Tensor::I64(_) => Dtype::I64,
            Tensor::U8(_) => Dtype::U8,
        };
        Operand::packed(dtype, sizes, &self.to_f64())
    }

    pub fn input(&self) -> Input<'_> {
        with!(self, data => data.into())
    }

    pub fn output(&mut self) -> Output<'_> {
        with!(self, data => data.into())
    }

    /// One unit in the last place of this dtype at `x`.
    pub fn ulp(&self, x: f64) -> f64 {
        // Stored bits of the significand, and the exponent of the smallest normal number.
        let (bits, least) = match self {
            Tensor::F64(_) => (52, -1022),
            Tensor::F32(_) => (23, -126),
            Tensor::Bf16(_) => (7, -126),
            Tensor::F16(_) => (10, -14),
            _ => panic!("not floats"),
        };
        let exponent = if x == 0.0 { least } else { (x.abs().log2().floor() as i32).max(least) };
        // In two steps, since powi cannot compute 2^-1074.
        2f64.powi(exponent) * 2f64.powi(-bits)
    }
}

fn base64(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let six = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => panic!("{byte} in base64"),
        };
        bits = bits << 6 | u32::from(six);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    bytes
}

/// One case: its words by key, and the tensors that words refer to.
pub struct Case {
    pub name: String,
    fields: HashMap<&'static str, &'static str>,
    tensors: Rc<Vec<Tensor>>,
}

pub fn load((file, text): Source) -> Vec<Case> {
    let (mut tensors, mut cases) = (Vec::new(), Vec::new());
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<&'static str> = line.split(' ').collect();
        match words[..] {
            ["t", id, dtype, shape, data] => {
                assert_eq!(id.parse(), Ok(tensors.len()));
                let tensor = Tensor::parse(dtype, data);
                let sizes = shape.split(',').filter(|size| *size != "-");
                let elements: usize = sizes.map(|size| size.parse::<usize>().unwrap()).product();
                assert_eq!(tensor.len(), elements, "{line}");
                tensors.push(tensor);
            }
            ["c", name, ref fields @ ..] => {
                let pairs = fields.iter().map(|field| field.split_once('=').unwrap());
                cases.push((name, pairs.collect::<HashMap<_, _>>()));
            }
            _ => panic!("{line}"),
        }
    }
    assert!(!cases.is_empty());
    let tensors = Rc::new(tensors);
    let case =
        |(name, fields)| Case { name: format!("{file}: {name}"), fields, tensors: tensors.clone() };
    cases.into_iter().map(case).collect()
}

impl Case {
    pub fn text(&self, key: &str) -> Option<&'static str> {
        self.fields.get(key).copied()
    }

    pub fn number(&self, key: &str, default: f64) -> f64 {
        self.text(key).map_or(default, |word| word.parse().unwrap())
    }

    pub fn find(&self, key: &str) -> Option<&Tensor> {
        self.text(key).map(|word| &self.tensors[word[1..].parse::<usize>().unwrap()])
    }

    #[track_caller]
    pub fn tensor(&self, key: &str) -> &Tensor {
        self.find(key).unwrap_or_else(|| panic!("{}: no {key}", self.name))
    }

    /// The numbers of rows, classes and inner positions.
    pub fn dims(&self) -> [usize; 3] {
        let sizes = self.text("dims").unwrap().split(',').map(|size| size.parse().unwrap());
        sizes.collect::<Vec<usize>>().try_into().unwrap()
    }

    pub fn log_probs(&self) -> bool {
        self.text("log_probs").is_some()
    }

    /// Whether the targets are of listed classes or of a teacher.
    pub fn distils(&self) -> bool {
        self.find("target_classes").is_some() || self.text("target_scale").is_some()
    }

    /// The sizes of the targets.
    pub fn target_sizes(&self) -> [usize; 3] {
        let [rows, classes, inner] = self.dims();
        let places =
            |listed: &Tensor| listed.len().checked_div(rows * inner).expect("a list has rows");
        [rows, self.find("target_classes").map_or(classes, places), inner]
    }

    /// Listed probabilities or a teacher's logits as the probabilities of all classes.
    fn distilled(&self) -> Targets {
        let sizes = self.target_sizes();
        let targets = self.tensor("targets").operand(sizes);
        let task = Task {
            target_classes: self.find("target_classes").map(|listed| listed.operand(sizes)),
            target_scale: self.number("target_scale", 0.0),
            ignore_index: self.ignore_index(),
            ..Task::new(self.tensor("logits").operand(self.dims()), targets)
        };
        task.case().targets
    }

    pub fn ignore_index(&self) -> i64 {
        self.text("ignore").map_or(-100, |word| word.parse().unwrap())
    }

    pub fn reduction(&self) -> Reduction {
        match self.text("reduction") {
            None | Some("mean") => Reduction::Mean,
            Some("sum") => Reduction::Sum,
            Some("none") => Reduction::None,
            Some(other) => panic!("reduction {other}"),
        }
    }

    /// The cross-entropy problem for the oracle.
    pub fn problem(&self) -> reference::Case {
        self.problem_of(self.tensor("logits").to_f64())
    }

    /// The same of other logits.
    pub fn problem_of(&self, logits: Vec<f64>) -> reference::Case {
        let [rows, classes, inner] = self.dims();
        let optional = |key| self.find(key).map(Tensor::to_f64);
        reference::Case {
            targets: match self.find("targets") {
                None => Targets::None,
                Some(_) if self.distils() => self.distilled(),
                Some(t) if t.is_float() => Targets::Probabilities(t.to_f64()),
                Some(t) => Targets::Indices(t.to_i64()),
            },
            class_weights: optional("weights"),
            row_weights: optional("row_weights"),
            row_mask: self.mask().map(|mask| mask.iter().map(|&byte| byte != 0).collect()),
            ignore_index: self.ignore_index(),
            label_smoothing: self.number("eps", 0.0),
            z_loss: self.number("z", 0.0),
            entropy_bonus: self.number("beta", 0.0),
            softcap: self.number("cap", 0.0),
            logit_scale: self.number("scale", 1.0),
            normalizer: self.number("normalizer", 0.0),
            z_normalizer: self.number("z_normalizer", 0.0),
            reduction: self.reduction(),
            log_probs: self.log_probs(),
            grad_output: optional("upstream").unwrap_or(vec![1.0]),
            ..reference::Case::new(rows, classes, inner, logits)
        }
    }

    pub fn mask(&self) -> Option<Vec<u8>> {
        let mask = self.find("row_mask")?.to_i64();
        Some(mask.iter().map(|&byte| u8::try_from(byte).unwrap()).collect())
    }

    /// The linear layer of a case, with packed operands.
    pub fn layer(&self) -> Layer {
        let [rows, classes, _] = self.dims();
        let features = self.number("features", 0.0) as usize;
        let by_row = [rows, 1, 1];
        let find = |key, sizes| self.find(key).map(|tensor| tensor.operand(sizes));
        let targets = self.tensor("targets");
        let targets = targets.operand(if targets.is_float() { [rows, classes, 1] } else { by_row });
        let hidden = self.tensor("hidden").operand([rows, features, 1]);
        let weight = self.tensor("weight").operand([classes, features, 1]);
        let layer = Layer::new(hidden, weight, find("bias", [1, classes, 1]), targets);
        let reduction = self.reduction();
        let task = Task {
            class_weights: find("weights", [1, classes, 1]),
            row_weights: find("row_weights", by_row),
            row_mask: self.mask().map(|mask| Tensor::U8(mask).operand(by_row)),
            grad_output: find(
                "upstream",
                if reduction == Reduction::None { by_row } else { [1; 3] },
            ),
            ignore_index: self.ignore_index(),
            label_smoothing: self.number("eps", 0.0),
            z_loss: self.number("z", 0.0),
            entropy_bonus: self.number("beta", 0.0),
            softcap: self.number("cap", 0.0),
            logit_scale: self.number("scale", 1.0),
            normalizer: self.number("normalizer", 0.0),
            z_normalizer: self.number("z_normalizer", 0.0),
            reduction: match reduction {
                Reduction::Mean => xent::Reduction::Mean,
                Reduction::Sum => xent::Reduction::Sum,
                Reduction::None => xent::Reduction::None,
            },
            ..layer.task
        };
        Layer { task, ..layer }
    }
}
