//! Every kernel on every instruction set over narrow to wide vocabularies, with the limits of the
//! machine beside them. Throughput is in bytes of logits. Buffers exceed the L2 cache; what a
//! call overwrites is restored outside the timed part.

mod common;

use common::{Aligned, copy, copy_streamed, logits, read, rows, scale, targets};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::{Duration, Instant};
use xent::{CrossEntropy, Isa};

const ELEMENTS: usize = 16 << 20;

fn cross_entropy(criterion: &mut Criterion) {
    for classes in [10, 1000, 32_000, 50_257, 128_256, 262_144] {
        let rows = if classes == 10 { 65_536 } else { rows(classes, ELEMENTS) };
        let original = Aligned::new(&logits(rows * classes));
        let (mut x, mut grad) = (Aligned::new(&original), Aligned::new(&original));
        let targets = targets(rows, classes);

        let mut group = criterion.benchmark_group(format!("{rows}x{classes}"));
        group.throughput(Throughput::Bytes((rows * classes * 4) as u64));
        group.sample_size(10).measurement_time(Duration::from_secs(2));
        group.bench_function("limit/read", |b| b.iter(|| black_box(read(&original))));
        group.bench_function("limit/scale", |b| b.iter(|| scale(&mut grad, 1.000_1)));
        group.bench_function("limit/copy", |b| b.iter(|| copy(&original, &mut grad)));
        group.bench_function("limit/copy streamed", |b| {
            b.iter(|| copy_streamed(&original, &mut grad));
        });
        for isa in Isa::ALL {
            if !isa.is_available() {
                eprintln!("skipped: this processor does not have {}", isa.name());
                continue;
            }
            let ce = CrossEntropy::new(rows, classes).isa(isa);
            let id = |name: &str| BenchmarkId::new(name, isa.name());
            group.bench_function(id("forward"), |b| {
                b.iter(|| black_box(ce.forward(&*original, &targets).unwrap()));
            });
            group.bench_function(id("forward_backward"), |b| {
                b.iter(|| {
                    black_box(ce.forward_backward(&*original, &targets, &mut *grad).unwrap())
                });
            });
            group.bench_function(id("forward_backward in place"), |b| {
                b.iter_custom(|iterations| {
                    let mut total = Duration::ZERO;
                    for _ in 0..iterations {
                        x.copy_from_slice(&original);
                        let start = Instant::now();
                        black_box(ce.forward_backward_in_place(&mut *x, &targets).unwrap());
                        total += start.elapsed();
                    }
                    total
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, cross_entropy);
criterion_main!(benches);
