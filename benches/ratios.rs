//! Each kernel beside the limit that memory sets it, in turns within one run, as ratios of
//! medians: the figure to trust on a shared machine. `cargo bench --bench ratios [-- MIB]`.

mod common;

use common::{Aligned, copy, copy_streamed, logits, read, rows, scale, targets};
use std::hint::black_box;
use std::time::Instant;
use xent::{CrossEntropy, Isa};

/// Turns; every one times each column once.
const TURNS: usize = 15;

fn time(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
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
            let mut times = vec![vec![]; 8];
            ce.lse(&*original, &mut lse).unwrap();
            for _ in 0..TURNS {
                times[0].push(time(|| {
                    black_box(read(&original));
                }));
                times[4].push(time(|| {
                    black_box(ce.forward(&*original, &targets).unwrap());
                }));
                times[1].push(time(|| scale(&mut grad, 1.000_1)));
                x.copy_from_slice(&original);
                times[5].push(time(|| {
                    black_box(ce.forward_backward_in_place(&mut *x, &targets).unwrap());
                }));
                times[2].push(time(|| copy(&original, &mut grad)));
                times[3].push(time(|| copy_streamed(&original, &mut grad)));
                times[6].push(time(|| {
                    black_box(ce.forward_backward(&*original, &targets, &mut *grad).unwrap());
                }));
                times[7]
                    .push(time(|| ce.backward(&*original, &targets, &lse, &mut *grad).unwrap()));
            }
            let t: Vec<f64> = times.iter_mut().map(|t| median(t)).collect();
            let copy = t[2].min(t[3]);
            let rate = |t: f64| n as f64 / t / 1e9;
            println!(
                "{classes:>8} {:>7} {:>6.2} {:>6.2} {:>6.2}  {:>9.3} {:>9.3} {:>9.3} {:>9.3}   ({:.2} / {:.2} / {:.2} Gelement/s)",
                isa.name(),
                rate(t[0]),
                rate(t[1]),
                rate(copy),
                t[0] / t[4],
                t[1] / t[5],
                copy / t[6],
                copy / t[7],
                rate(t[4]),
                rate(t[5]),
                rate(t[6]),
            );
        }
    }
}
