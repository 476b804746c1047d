//! Every call on every dtype, layout, instruction set and size class, by criterion. Names are
//! `dtype/layout/call/isa/shape/variant`, to be filtered by: `cargo bench --bench cross_entropy --
//! 'f32/contiguous/forward/avx512'`. Throughput is in logits.
//!
//! `hot` is one problem that stays in the caches of one core, called again and again on one thread.
//! `rotating` is a round of problems, on all threads, larger together than twice the last cache (or
//! 512 MiB, if that is less): no call finds its logits in a cache.
//!
//! The oracle checks each call before it is timed. Overwritten inputs are restored outside of the timed
//! part.

mod common;
#[path = "common/oracle.rs"]
mod oracle;

use common::aligned::Aligned;
use common::call::{Call, Layout, Operands, Shape};
use common::scalar::{self, Scalar};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::time::{Duration, Instant};
use xent::Isa;
use xent::half::{bf16, f16};

/// Classes of each size class: narrow, short and wide rows, and one row of many chunks.
const CLASSES: [usize; 4] = [10, 1000, 50_257, 1 << 20];

/// Logits of a hot problem (or one row): with a gradient they fit an L2 cache of 1 MiB as f32.
const HOT: usize = 64 << 10;

/// Logits of a problem of the rotating variant (or one row): enough for all threads.
const ROTATING: usize = 4 << 20;

fn cross_entropy(criterion: &mut Criterion) {
    each::<f32>(criterion);
    each::<bf16>(criterion);
    each::<f16>(criterion);
    each::<f64>(criterion);
}

fn each<T: Scalar>(criterion: &mut Criterion) {
    // Allocated when the first benchmark that needs it passes the filter, and shared by the others.
    let mut arena: Option<Vec<[Aligned<T>; 2]>> = None;
    for layout in Layout::ALL {
        for call in Call::ALL {
            for isa in Isa::ALL {
                if !isa.is_available() {
                    eprintln!("skipped: this processor does not have {}", isa.name());
                    continue;
                }
                let name = format!("{}/{}/{}/{}", T::NAME, layout.name(), call.name(), isa.name());
                let mut group = criterion.benchmark_group(name);
                group
                    .sample_size(10)
                    .warm_up_time(Duration::from_millis(50))
                    .measurement_time(Duration::from_millis(200));
                for classes in CLASSES {
                    let shape = Shape::about(layout, classes, HOT);
                    group.throughput(Throughput::Elements(shape.elements() as u64));
                    let mut hot = None;
                    group.bench_function(BenchmarkId::new(shape.to_string(), "hot"), |b| {
                        let (operands, buffers) = hot.get_or_insert_with(|| {
                            oracle::check::<T>(shape, call, isa);
                            let operands = Operands::<T>::new(shape, call);
                            let buffers = [0, 1].map(|_| Aligned::new(&operands.original));
                            (operands, [buffers])
                        });
                        b.iter_custom(|calls| time(operands, call, isa, 1, calls, buffers));
                    });

                    let shape = Shape::about(layout, classes, ROTATING);
                    group.throughput(Throughput::Elements(shape.elements() as u64));
                    let mut rotating = None;
                    group.bench_function(BenchmarkId::new(shape.to_string(), "rotating"), |b| {
                        let arena = arena.get_or_insert_with(rotation);
                        let operands = rotating.get_or_insert_with(|| {
                            oracle::check::<T>(shape, call, isa);
                            Operands::<T>::new(shape, call)
                        });
                        b.iter_custom(|calls| time(operands, call, isa, 0, calls, arena));
                    });
                }
                group.finish();
            }
        }
    }
}

/// Logits and gradients, each pair enough for the largest rotating problem.
fn rotation<T: Scalar>() -> Vec<[Aligned<T>; 2]> {
    let logits = scalar::logits::<T>(ROTATING + ROTATING / 4);
    let bytes = logits.len() * size_of::<T>();
    let pairs = (2 * last_cache()).min(512 << 20).div_ceil(bytes).max(2);
    (0..pairs).map(|_| [0, 1].map(|_| Aligned::new(&logits))).collect()
}

/// Time of so many calls, going around the buffers.
fn time<T: Scalar>(
    operands: &Operands<T>,
    call: Call,
    isa: Isa,
    threads: u32,
    calls: u64,
    buffers: &mut [[Aligned<T>; 2]],
) -> Duration {
    let (mut total, len) = (Duration::ZERO, operands.shape.elements());
    for i in 0..calls as usize {
        let next = i % buffers.len();
        if call.overwrites() && next == 0 {
            // All at once: otherwise the buffer to be timed next would be in the caches.
            restore(operands, calls as usize - i, buffers);
        }
        let [x, grad] = &mut buffers[next];
        let start = Instant::now();
        operands.run(call, isa, threads, &mut x[..len], &mut grad[..len]);
        total += start.elapsed();
    }
    if call.overwrites() {
        // Restores the logits for calls that read them.
        restore(operands, calls as usize, buffers);
    }
    total
}

fn restore<T: Scalar>(operands: &Operands<T>, number: usize, buffers: &mut [[Aligned<T>; 2]]) {
    for [x, _] in buffers.iter_mut().take(number) {
        x[..operands.shape.elements()].copy_from_slice(&operands.original);
    }
}

/// Bytes of the largest cache.
fn last_cache() -> usize {
    let size = |index: usize| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = std::fs::read_to_string(path).ok()?;
        text.trim().strip_suffix('K')?.parse::<usize>().ok()
    };
    (0..8).filter_map(size).max().map_or(64 << 20, |kib| kib << 10)
}

criterion_group!(benches, cross_entropy);
criterion_main!(benches);
