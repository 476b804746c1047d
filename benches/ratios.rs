//! Each kernel beside the limit that memory sets it, in turns within one run, as ratios of
//! medians: the figure to trust on a shared machine. `cargo bench --bench ratios [-- MIB]`.

mod common;

use common::{Aligned, copy, copy_streamed, logits, read, rows, scale, targets};
use std::hint::black_box;
use std::time::Instant;
use xent::{CrossEntropy, Isa};

/// Turns; every one times each column.
const TURNS: usize = 9;

/// Calls of which the fastest counts for a turn: others met a neighbour.
const CALLS: usize = 4;

/// Seconds of the fastest of a few calls, each after `restore`.
fn time<T>(state: &mut T, restore: impl Fn(&mut T), f: impl Fn(&mut T)) -> f64 {
    let calls = (0..CALLS).map(|_| {
        restore(state);
        let start = Instant::now();
        f(state);
        start.elapsed().as_secs_f64()
    });
    calls.fold(f64::INFINITY, f64::min)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let mib: usize = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(64);
    let elements = mib << 18;
    println!(
        "{mib} MiB of f32 logits, {} threads; Gelement/s of each limit, then the kernels as ratios",
        rayon::current_num_threads()
    );
    println!(
        "{:>8} {:>7} {:>6} {:>6} {:>6}  {:>9} {:>9} {:>9} {:>9}",
        "classes", "isa", "read", "scale", "copy", "forward", "in place", "out of pl", "backward"
    );
    for classes in [10, 1000, 32_000, 50_257, 128_256, 262_144] {
        let rows = if classes == 10 { 65_536 } else { rows(classes, elements) };
        let n = rows * classes;
        let original = Aligned::new(&logits(n));
        let (mut x, mut grad) = (Aligned::new(&original), Aligned::new(&original));
        let targets = targets(rows, classes);
        let mut lse = vec![0.0; rows];
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            if isa == Isa::Portable && Isa::best() != Isa::Portable {
                continue;
            }
            let ce = CrossEntropy::new(rows, classes).isa(isa);
            ce.lse(&*original, &mut lse).unwrap();
            let keep = |_: &mut Aligned| {};
            let turns: Vec<[f64; 8]> = (0..TURNS)
                .map(|_| {
                    [
                        time(&mut grad, keep, |_| {
                            black_box(read(&original));
                        }),
                        time(&mut x, |x| x.copy_from_slice(&original), |x| scale(x, 1.000_1)),
                        time(&mut grad, keep, |grad| copy(&original, grad)),
                        time(&mut grad, keep, |grad| copy_streamed(&original, grad)),
                        time(&mut grad, keep, |_| {
                            black_box(ce.forward(&*original, &targets).unwrap());
                        }),
                        time(
                            &mut x,
                            |x| x.copy_from_slice(&original),
                            |x| {
                                black_box(
                                    ce.forward_backward_in_place(&mut **x, &targets).unwrap(),
                                );
                            },
                        ),
                        time(&mut grad, keep, |grad| {
                            let loss = ce.forward_backward(&*original, &targets, &mut **grad);
                            black_box(loss.unwrap());
                        }),
                        time(&mut grad, keep, |grad| {
                            ce.backward(&*original, &targets, &lse, &mut **grad).unwrap();
                        }),
                    ]
                })
                .collect();
            // Ratios within a turn, and then their median: the machine's mood cancels.
            let of = |f: &dyn Fn(&[f64; 8]) -> f64| median(turns.iter().map(f).collect());
            let rate = |f: &dyn Fn(&[f64; 8]) -> f64| n as f64 / of(f) / 1e9;
            println!(
                "{classes:>8} {:>7} {:>6.2} {:>6.2} {:>6.2}  {:>9.3} {:>9.3} {:>9.3} {:>9.3}   ({:.2} / {:.2} / {:.2} Gelement/s)",
                isa.name(),
                rate(&|t| t[0]),
                rate(&|t| t[1]),
                rate(&|t| t[2].min(t[3])),
                of(&|t| t[0] / t[4]),
                of(&|t| t[1] / t[5]),
                of(&|t| t[2].min(t[3]) / t[6]),
                of(&|t| t[2].min(t[3]) / t[7]),
                rate(&|t| t[4]),
                rate(&|t| t[5]),
                rate(&|t| t[6]),
            );
        }
    }
}
