//! The targets of docs/performance.md: the time of each kernel relative to a limit of the machine. Kernel
//! and limit take turns within one run, and the figure is the median of the ratios of all turns. Machines
//! are noisy and differ, but such ratios repeat.
//!
//! `cargo xtask bench` runs this bench and records it; alone it is `cargo bench --bench targets --
//! [--turns N] [--mib N] [--large] [--record FILE]`. A target that is missed is printed and fails
//! nothing.

mod common;

use common::aligned::Aligned;
use common::call::{Call, Operands, Shape};
use common::limits::{self, VARIANTS};
use common::record::{Record, Target};
use common::scalar::Scalar;
use common::timing::{fastest, median, seconds};
use std::hint::black_box;
use xent::Isa;
use xent::half::{bf16, f16};

#[path = "common/heap.rs"]
mod heap;
#[path = "common/oracle.rs"]
mod oracle;

/// The number of calls of a turn, of which the fastest counts: other processes disturb the rest. Each
/// variant of a limit gets as many.
const CALLS: usize = 3;

/// A kernel gets as many calls as all variants of its limit together.
const TRIES: usize = CALLS * VARIANTS;

/// Wide vocabularies: the classes that the targets speak of.
const WIDE: [usize; 4] = [32_000, 50_257, 128_256, 262_144];

/// Classes of the picture that shows throughput against them.
const SWEEP: [usize; 12] =
    [4, 10, 32, 100, 316, 1000, 3162, 10_000, 32_000, 100_000, 316_228, 1_000_000];

fn main() {
    let mut options = Options { turns: 7, mib: 64, large: false, record: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|n| n.parse().ok()).expect("a number");
        match argument.as_str() {
            "--turns" => options.turns = number(),
            "--mib" => options.mib = number(),
            "--large" => options.large = true,
            "--record" => options.record = Some(arguments.next().expect("a file")),
            // cargo's own.
            "--bench" => {}
            other => {
                eprintln!("targets: not understood: {other}");
                std::process::exit(2);
            }
        }
    }
    let all = rayon::current_num_threads() as u32;
    let mut record = Record::new(&options.record, all, options.mib);
    arithmetic(&mut record);
    for threads in if all == 1 { vec![1] } else { vec![all, 1] } {
        for classes in WIDE {
            against_limits(&options, &mut record, classes, threads, true);
        }
        against_limits(&options, &mut record, 1000, threads, true);
    }
    narrow(&options, &mut record, all);
    inner(&options, &mut record, all);
    one_row(&options, &mut record, all);
    heap_in_calls(&mut record, all);
    for threads in if all == 1 { vec![1] } else { vec![1, all] } {
        for classes in SWEEP {
            against_limits(&options, &mut record, classes, threads, false);
        }
    }
    growth(&options, &mut record, all);
    record.close();
}

struct Options {
    turns: usize,
    mib: usize,
    large: bool,
    record: Option<String>,
}

/// Something that is timed.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Job {
    Read,
    Scale,
    Copy,
    Call(Call, Isa),
}

/// A problem with the memory to time it in.
struct Bench<T> {
    operands: Operands<T>,
    /// Logits that nothing writes. Memory that was written lately is slower to read, by up to half, and a
    /// limit has to read as its kernels do.
    read: Aligned<T>,
    /// The memory that calls in place and `scale` write.
    written: Aligned<T>,
    grad: Aligned<T>,
    threads: u32,
}

impl<T: Scalar> Bench<T> {
    /// A bench of these calls; the oracle checks each first.
    fn new(shape: Shape, threads: u32, calls: &[Call], isas: &[Isa]) -> Self {
        for &call in calls {
            isas.iter().for_each(|&isa| oracle::check::<T>(shape, call, isa));
        }
        // An lse for all that may need one.
        let operands = Operands::<T>::new(shape, Call::Backward);
        let copy = || Aligned::new(&operands.original);
        Bench { read: copy(), written: copy(), grad: copy(), operands, threads }
    }

    /// Seconds of the fastest of a few calls.
    fn call(&mut self, call: Call, isa: Isa) -> f64 {
        let (operands, grad, threads) = (&self.operands, &mut self.grad, self.threads);
        let times = (0..TRIES).map(|_| {
            let x = if call.overwrites() { &mut self.written } else { &mut self.read };
            if call.overwrites() {
                x.copy_from_slice(&operands.original);
            }
            seconds(|| {
                operands.run(call, isa, threads, x, grad);
            })
        });
        times.fold(f64::INFINITY, f64::min)
    }

    fn gelements(&self, seconds: f64) -> f64 {
        self.operands.shape.elements() as f64 / seconds / 1e9
    }
}

impl Bench<f32> {
    /// Seconds of the fastest of a limit's variants, or of a call.
    fn job(&mut self, job: Job) -> f64 {
        let threads = self.threads;
        let variants =
            |f: &mut dyn FnMut(usize) -> f64| (0..VARIANTS).map(f).fold(f64::INFINITY, f64::min);
        let (original, read) = (&self.operands.original, &self.read);
        match job {
            Job::Read => variants(&mut |variant| {
                fastest(CALLS, &mut (), |()| (), |()| limits::read(variant, threads, read))
            }),
            Job::Scale => variants(&mut |variant| {
                let restore = |x: &mut Aligned<f32>| x.copy_from_slice(original);
                let scale = |x: &mut Aligned<f32>| limits::scale(variant, threads, x, 1.001);
                fastest(CALLS, &mut self.written, restore, scale)
            }),
            Job::Copy => variants(&mut |variant| {
                let grad = &mut self.grad;
                fastest(CALLS, grad, |_| (), |to| limits::copy(variant, threads, read, to))
            }),
            Job::Call(call, isa) => self.call(call, isa),
        }
    }
}

/// The sets that are measured: AVX-512 and AVX2, or the best there is.
fn isas() -> Vec<Isa> {
    let mut isas: Vec<Isa> =
        [Isa::Avx512, Isa::Avx2].into_iter().filter(|i| i.is_available()).collect();
    if isas.is_empty() {
        isas.push(Isa::best());
    }
    isas
}

/// The calls that have a limit, with it and the targets for wide rows and for 1000 classes.
const LIMITED: [(Call, Job, &str, f64); 4] = [
    (Call::Forward, Job::Read, "read", 0.95),
    (Call::InPlace, Job::Scale, "scale", 0.80),
    (Call::Both, Job::Copy, "copy", 0.85),
    (Call::Backward, Job::Copy, "copy", f64::NAN),
];

/// Rows of so many classes relative to the limits; the sets and the dtypes relative to each other.
fn against_limits(
    options: &Options,
    record: &mut Record,
    classes: usize,
    threads: u32,
    judged: bool,
) {
    let elements = options.mib << 18;
    let rows = if classes == 1000 && judged { 8192 } else { (elements / classes).max(1) };
    let shape = Shape::rows(rows, classes);
    let isas = if judged { isas() } else { vec![isas()[0]] };
    let calls = LIMITED.map(|(call, ..)| call);
    let mut bench = Bench::<f32>::new(shape, threads, &calls, &isas);
    let mut jobs = vec![Job::Read, Job::Scale, Job::Copy];
    for &isa in &isas {
        jobs.extend(calls.map(|call| Job::Call(call, isa)));
    }
    // A figure for the picture needs few turns.
    let number = if judged { options.turns } else { options.turns.div_ceil(3) };
    let turns: Vec<Vec<f64>> =
        (0..number).map(|_| jobs.iter().map(|&job| bench.job(job)).collect()).collect();
    let at = |job: Job| jobs.iter().position(|&j| j == job).expect("a job of this run");
    let ratio = |a: Job, b: Job| median(turns.iter().map(|turn| turn[at(a)] / turn[at(b)]));
    let rate = |job: Job| bench.gelements(median(turns.iter().map(|turn| turn[at(job)])));

    let all = rayon::current_num_threads() as u32;
    for (job, name) in [(Job::Read, "read"), (Job::Scale, "scale"), (Job::Copy, "copy")] {
        record.limit(name, shape, threads, rate(job));
    }
    for &isa in &isas {
        for (call, limit, name, target) in LIMITED {
            // Of 8192×1000, 0.85 of each target.
            let target = if classes == 1000 { target * 0.85 } else { target };
            let applies = judged && isa == Isa::Avx512 && threads == all && target.is_finite();
            let target = if applies { Target::AtLeast(target) } else { Target::None };
            let job = Job::Call(call, isa);
            record.ratio::<f32>(
                call,
                shape,
                isa,
                threads,
                rate(job),
                ratio(limit, job),
                name,
                target,
            );
        }
    }
    if let ([best @ Isa::Avx512, other], true) = (&isas[..], judged) {
        for (call, ..) in LIMITED {
            let ratio = ratio(Job::Call(call, *best), Job::Call(call, *other));
            let target = if threads == all { Target::AtLeast(0.6) } else { Target::None };
            let rate = rate(Job::Call(call, *other));
            record.ratio::<f32>(call, shape, *other, threads, rate, ratio, "avx512", target);
        }
    }
    if judged && threads == all && [1000, 32_000].contains(&classes) {
        for &isa in &isas {
            against_f32::<bf16>(options, record, &mut bench, isa, 1.5);
            against_f32::<f16>(options, record, &mut bench, isa, f64::NAN);
            against_f32::<f64>(options, record, &mut bench, isa, f64::NAN);
        }
    }
}

/// Another dtype, by the elements per second of f32.
fn against_f32<T: Scalar>(
    options: &Options,
    record: &mut Record,
    of: &mut Bench<f32>,
    isa: Isa,
    forward: f64,
) {
    let (shape, threads) = (of.operands.shape, of.threads);
    let calls = [Call::Forward, Call::InPlace, Call::Both];
    let mut bench = Bench::<T>::new(shape, threads, &calls, &[isa]);
    for call in calls {
        let turns: Vec<[f64; 2]> = (0..options.turns)
            .map(|_| [of.job(Job::Call(call, isa)), bench.call(call, isa)])
            .collect();
        let ratio = median(turns.iter().map(|[a, b]| a / b));
        let rate = bench.gelements(median(turns.iter().map(|turn| turn[1])));
        let all = rayon::current_num_threads() as u32;
        let applies = call == Call::Forward
            && forward.is_finite()
            && isa == Isa::Avx512
            && threads == all
            && shape.classes >= 32_000;
        let target = if applies { Target::AtLeast(forward) } else { Target::None };
        record.ratio::<T>(call, shape, isa, threads, rate, ratio, "f32", target);
    }
}

/// The rate of one thread over numbers in its L1 cache.
fn arithmetic(record: &mut Record) {
    let x = Aligned::new(&common::scalar::logits::<f32>(4096));
    let time = fastest(
        1000,
        &mut (),
        |()| (),
        |()| {
            black_box(limits::exp(black_box(&x)));
        },
    );
    record.limit("exp", Shape::rows(1, 4096), 1, 4096.0 / time / 1e9);
}

/// 65536 rows of 10 classes, in Gelement/s.
fn narrow(options: &Options, record: &mut Record, all: u32) {
    let shape = Shape::rows(65_536, 10);
    let targets = [(Call::Forward, 3.0), (Call::Both, 2.0), (Call::InPlace, 2.0)];
    for threads in if all == 1 { vec![1] } else { vec![all, 1] } {
        let isas = isas();
        let calls = targets.map(|(call, _)| call);
        let mut bench = Bench::<f32>::new(shape, threads, &calls, &isas);
        for &isa in &isas {
            for (call, target) in targets {
                let turns = (0..options.turns * 3).map(|_| bench.job(Job::Call(call, isa)));
                let rate = bench_rate(shape, median(turns));
                let applies = isa == Isa::Avx512 && threads == all;
                let target = if applies { Target::Rate(target) } else { Target::None };
                record.rate::<f32>(call, shape, isa, threads, rate, target);
            }
        }
    }
}

fn bench_rate(shape: Shape, seconds: f64) -> f64 {
    shape.elements() as f64 / seconds / 1e9
}

/// Images, relative to contiguous rows of as many elements.
fn inner(options: &Options, record: &mut Record, all: u32) {
    let (image, rows) = (Shape::inner(8, 21, 512 * 512), Shape::rows(168, 512 * 512));
    let calls = [Call::Forward, Call::InPlace, Call::Both];
    let isas = isas();
    let mut images = Bench::<f32>::new(image, all, &calls, &isas);
    let mut contiguous = Bench::<f32>::new(rows, all, &[], &isas);
    for &isa in &isas {
        for call in calls {
            let turns: Vec<[f64; 2]> = (0..options.turns.div_ceil(2))
                .map(|_| {
                    let job = Job::Call(call, isa);
                    [contiguous.job(job), images.job(job)]
                })
                .collect();
            let ratio = median(turns.iter().map(|[a, b]| a / b));
            let rate = images.gelements(median(turns.iter().map(|turn| turn[1])));
            let target = if isa == Isa::Avx512 { Target::AtLeast(0.7) } else { Target::None };
            record.ratio::<f32>(call, image, isa, all, rate, ratio, "contiguous", target);
        }
    }
}

/// One row of 2M classes, all threads against one.
fn one_row(options: &Options, record: &mut Record, all: u32) {
    if all == 1 {
        return;
    }
    let shape = Shape::rows(1, 2 << 20);
    let calls = [Call::Forward, Call::InPlace, Call::Both];
    let isa = isas()[0];
    let mut bench = Bench::<f32>::new(shape, 1, &calls, &[isa]);
    for call in calls {
        let turns: Vec<[f64; 2]> = (0..options.turns * 3)
            .map(|_| {
                [1, 2].map(|threads| {
                    bench.threads = threads;
                    bench.job(Job::Call(call, isa))
                })
            })
            .collect();
        let ratio = median(turns.iter().map(|[one, two]| one / two));
        let rate = bench.gelements(median(turns.iter().map(|turn| turn[1])));
        let target = Target::AtLeast(1.8);
        record.ratio::<f32>(call, shape, isa, 2, rate, ratio, "1 thread", target);
    }
}

/// Bytes that a call has allocated at most at a time, small and large.
fn heap_in_calls(record: &mut Record, all: u32) {
    let isa = isas()[0];
    for call in [Call::Forward, Call::Backward, Call::Both, Call::InPlace, Call::Softmax] {
        for shape in [Shape::rows(64, 1000), Shape::rows(16_384, 1000), Shape::rows(4, 4 << 20)] {
            let operands = Operands::<f32>::new(shape, call);
            let mut x = Aligned::new(&operands.original);
            let mut grad = Aligned::filled(shape.elements(), 0f32);
            // The pool's threads are the first call's.
            operands.run(call, isa, all, &mut x, &mut grad);
            let peak = heap::peak(|| {
                operands.run(call, isa, all, &mut x, &mut grad);
            });
            record.heap(call, shape, isa, all, peak);
        }
    }
}

/// Time per element as problems grow. Small ones go through the memory that the largest needs, so
/// that none finds its logits in a cache.
fn growth(options: &Options, record: &mut Record, all: u32) {
    let scale = if options.mib < 64 { 100 } else { 1 };
    grow::<f32>(record, all, &[1_000_000, 10_000_000, 100_000_000, 1_000_000_000 / scale]);
    if options.large {
        grow::<bf16>(record, all, &[1_000_000, 100_000_000, 1_000_000_000, 4_000_000_000]);
    }
}

fn grow<T: Scalar>(record: &mut Record, all: u32, sizes: &[usize]) {
    const CLASSES: usize = 32_000;
    let isa = isas()[0];
    let largest = *sizes.iter().max().expect("sizes") / CLASSES * CLASSES;
    // A pattern of its own for each row would take longer to make than to measure.
    let row = common::scalar::logits::<T>(1 << 20);
    let mut memory = Aligned::filled(largest, T::default());
    for block in memory.chunks_mut(row.len()) {
        block.copy_from_slice(&row[..block.len()]);
    }
    for call in [Call::Forward, Call::InPlace] {
        let mut times = Vec::new();
        for &size in sizes {
            let shape = Shape::rows(size.min(largest) / CLASSES, CLASSES);
            let operands = Operands::<T> {
                shape,
                original: Aligned::filled(1, T::default()),
                targets: common::scalar::targets(shape.rows, CLASSES),
                probabilities: Vec::new(),
                lse: Vec::new(),
            };
            // As many calls as make 0.1 s or so, but all of the memory at most twice.
            let calls = (300_000_000 / shape.elements()).clamp(2, 300);
            let mut parts = memory.chunks_exact_mut(shape.elements());
            let mut seen = Vec::new();
            for _ in 0..calls {
                let Some(part) = parts.next() else { break };
                seen.push(seconds(|| {
                    operands.run(call, isa, all, part, &mut []);
                }));
            }
            let rate = bench_rate(shape, median(seen));
            times.push(1.0 / rate);
            record.rate::<T>(call, shape, isa, all, rate, Target::None);
        }
        let largest = times.iter().copied().fold(0f64, f64::max);
        let smallest = times.iter().copied().fold(f64::INFINITY, f64::min);
        let from = Shape::rows(sizes[sizes.len() - 1] / CLASSES, CLASSES);
        let target = Target::AtMost(1.15);
        record.growth::<T>(call, from, isa, all, largest / smallest, target);
    }
}
