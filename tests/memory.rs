//! Allocations: a call that stays on its thread allocates nothing; a call over threads allocates rayon's
//! jobs, whatever C and N·C are.
//!
//! The allocator counts the allocations of every thread. The tests therefore run one after the other,
//! without the harness and its threads: `main` replaces it, and takes the names of tests, `--ignored` and
//! `--list`.

use common::is_sampled;
use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use xent::half::{bf16, f16};
use xent::{
    CrossEntropy, Error, Input, Isa, Linear, LinearGrads, Number, Output, Partial, Pool, Reduction,
    Results, Softmax,
};

/// The system's allocator, which counts the requests.
struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);
/// Whether the next allocation prints a backtrace.
static SHOWN: AtomicBool = AtomicBool::new(false);

fn count(bytes: usize) {
    CALLS.fetch_add(1, Ordering::Relaxed);
    BYTES.fetch_add(bytes, Ordering::Relaxed);
    LARGEST.fetch_max(bytes, Ordering::Relaxed);
    if SHOWN.swap(false, Ordering::Relaxed) {
        eprintln!("{bytes} bytes are allocated here:\n{}", Backtrace::force_capture());
    }
}

// SAFETY: every method passes its arguments on to the system's allocator and returns its result.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`, which is also that of the system's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the contract of this method, which is also that of the system's.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: the caller keeps the contract of this method, which is also that of the system's.
        unsafe { System.realloc(p, layout, size) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of this method, which is also that of the system's.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The allocations during a call.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Count {
    calls: usize,
    bytes: usize,
    largest: usize,
}

fn counted<R>(body: impl FnOnce() -> R) -> (R, Count) {
    CALLS.store(0, Ordering::Relaxed);
    BYTES.store(0, Ordering::Relaxed);
    LARGEST.store(0, Ordering::Relaxed);
    let result = body();
    let read = |x: &AtomicUsize| x.load(Ordering::Relaxed);
    (result, Count { calls: read(&CALLS), bytes: read(&BYTES), largest: read(&LARGEST) })
}

/// The number of threads of the pool for large problems.
const THREADS: usize = 3;

/// The bytes that the jobs of a call over [`THREADS`] threads may take at once, and in total: below half a
/// bit for each element of the problems tested. Each of the up to three steps of a call asks for 1.9 KiB and
/// gives them back, to see whether there is memory, before rayon takes 1.5 KiB at most. The results of
/// tasks take 4.4 KiB where merged states are finished, and less elsewhere.
const JOB: usize = 5 << 10;
const JOBS: usize = 12 << 10;

/// How to run a call, which decides what the call may allocate.
#[derive(Clone, Copy)]
enum Team<'a> {
    /// Told to stay on the calling thread: no allocation.
    Alone,
    /// Small enough to stay on the calling thread: no allocation.
    Small,
    /// Over the test's pool, or rayon's: jobs.
    Pool(&'a Pool),
    Global,
}

impl Team<'_> {
    fn allows(self, count: Count) -> bool {
        match self {
            Team::Alone | Team::Small => count.calls == 0,
            Team::Pool(_) | Team::Global => count.largest <= JOB && count.bytes <= JOBS,
        }
    }

    fn threads(self) -> u32 {
        u32::from(matches!(self, Team::Alone))
    }
}

/// The calls of one problem; checks the allocations of each.
struct Watch<'a> {
    team: Team<'a>,
    at: String,
    calls: usize,
    /// The number of calls that allocated.
    with_jobs: usize,
    most: Count,
}

impl Watch<'_> {
    #[track_caller]
    fn call(&mut self, name: &str, mut body: impl FnMut() -> Result<(), Error>) {
        let (result, count) = counted(&mut body);
        result.unwrap_or_else(|error| panic!("{name}, {}: {error}", self.at));
        if !self.team.allows(count) {
            SHOWN.store(true, Ordering::Relaxed);
            let _ = body();
            panic!("{name}, {}: allocates {count:?}", self.at);
        }
        self.calls += 1;
        self.with_jobs += usize::from(count.calls > 0);
        if count.bytes >= self.most.bytes {
            self.most = count;
        }
    }
}

/// A dtype of logits and gradients.
trait Float: Number + 'static {
    const NAME: &'static str;
    fn of(x: f32) -> Self;
}
macro_rules! floats {
    ($($type:ident: $of:expr;)*) => {$(
        impl Float for $type {
            const NAME: &'static str = stringify!($type);
            fn of(x: f32) -> $type {
                $of(x)
            }
        }
    )*};
}
floats! {
    f32: |x| x;
    f64: f64::from;
    bf16: bf16::from_f32;
    f16: f16::from_f32;
}

/// The layout of `[rows, classes]`.
#[derive(Clone, Copy, Debug)]
enum OperandLayout {
    Rows,
    /// As `[1, classes, rows]`.
    Positions,
    /// Every other element.
    Spread,
}

struct Shape {
    rows: usize,
    classes: usize,
    layout: OperandLayout,
}

impl Shape {
    fn rows_and_inner(&self) -> [usize; 2] {
        if let OperandLayout::Positions = self.layout { [1, self.rows] } else { [self.rows, 1] }
    }

    fn strides(&self) -> [i64; 3] {
        let [rows, classes] = [self.rows as i64, self.classes as i64];
        match self.layout {
            OperandLayout::Rows => [classes, 1, 1],
            OperandLayout::Positions => [0, rows, 1],
            OperandLayout::Spread => [2 * classes, 2, 1],
        }
    }

    fn cells(&self) -> usize {
        self.rows * self.classes * if let OperandLayout::Spread = self.layout { 2 } else { 1 }
    }
}

/// Options of the loss, by name.
const OPTIONS: [&str; 9] = [
    "plain", "smoothing", "weights", "cap", "z-loss", "entropy bonus", "none", "accumulate",
    "log-probs",
];

/// All options; in a sample one per call, in turn.
fn some<T: Copy>(all: &[T]) -> Vec<T> {
    static TURN: AtomicUsize = AtomicUsize::new(0);
    if !is_sampled() {
        return all.to_vec();
    }
    let turn = TURN.fetch_add(1, Ordering::Relaxed);
    vec![all[(turn + turn / all.len()) % all.len()]]
}

/// Makes every call with logits of `L` and gradients of `G`, on one set.
fn every_call<L: Float, G: Float>(shape: &Shape, isa: Isa, watch: &mut Watch<'_>) {
    let Shape { rows, classes, .. } = *shape;
    let strides = shape.strides();
    let value = |i: usize| L::of((i * 37 % 64) as f32 / 16.0 - 2.0);
    let mut x: Vec<L> = (0..shape.cells()).map(value).collect();
    let mut grad = vec![G::of(0.25); shape.cells()];
    let mut y = x.clone();
    let soft: Vec<f32> = (0..rows * classes).map(|i| (i % 3) as f32 / classes as f32).collect();
    let mut grad_soft = vec![0f32; rows * classes];
    let packed = Shape {
        layout: if let OperandLayout::Spread = shape.layout {
            OperandLayout::Rows
        } else {
            shape.layout
        },
        ..*shape
    };
    let indices: Vec<i32> = (0..rows).map(|row| (row * 7 % classes) as i32).collect();
    let class_weights: Vec<f32> = (0..classes).map(|c| 0.5 + (c % 4) as f32).collect();
    let (row_weights, mask) = (vec![0.5f64; rows], vec![1u8; rows]);
    let upstream = vec![-0.5f32; rows];
    let (mut loss, mut z_loss, mut kept, mut correct) = (0.0, 0.0, 0, 0);
    let (mut losses, mut lse, mut entropy) = (vec![0f32; rows], vec![1.0; rows], vec![0.0; rows]);
    let (mut argmax, mut states) = (vec![0; rows], vec![Partial::EMPTY; rows]);
    let top_count = classes.min(64);
    let (mut top_classes, mut top_log_probs) =
        (vec![0; rows * top_count], vec![0f32; rows * top_count]);
    let mut target_ranks = vec![0; rows];
    let [n, inner] = shape.rows_and_inner();
    let pool =
        |call: CrossEntropy<'static>| call.inner(inner).isa(isa).threads(watch.team.threads());
    let base = pool(CrossEntropy::new(n, classes));
    for option in some(&OPTIONS) {
        let mut call: CrossEntropy<'_> = base;
        if let Team::Pool(pool) = watch.team {
            call = call.pool(pool);
        }
        let is_none = option == "none";
        let log_probs = option == "log-probs";
        call = match option {
            "smoothing" => call.label_smoothing(0.1),
            "weights" => call
                .class_weights(&class_weights)
                .label_smoothing(0.1)
                .row_weights(&row_weights)
                .row_mask(&mask),
            "cap" => call.softcap(20.0).logit_scale(0.5),
            "z-loss" => call.z_loss(1e-3).reduction(Reduction::Sum),
            "entropy bonus" => call.entropy_bonus(0.5),
            "none" => call.reduction(Reduction::None).grad_output(&upstream),
            "accumulate" => call.accumulate(true),
            "log-probs" => call.log_probs(true),
            _ => call,
        };
        for (kind, targets) in [
            ("indices", Input::from(&indices)),
            ("probabilities", Input::from(&soft).strides(packed.strides())),
        ] {
            let name = |call: &str| format!("{call}, {option}, {kind}");
            let is_index = kind == "indices";
            macro_rules! results {
                () => {
                    Results {
                        loss: (!is_none).then_some(&mut loss),
                        z_loss: (!is_none && !log_probs).then_some(&mut z_loss),
                        row_losses: Some((&mut losses).into()),
                        lse: (!log_probs).then_some(&mut lse),
                        argmax: Some(&mut argmax),
                        correct: is_index.then_some(&mut correct),
                        kept_rows: Some(&mut kept),
                        entropy: (!log_probs).then(|| (&mut entropy).into()),
                        ..Results::default()
                    }
                };
            }
            macro_rules! all_results {
                () => {
                    Results {
                        top_classes: Some(&mut top_classes),
                        top_log_probs: Some((&mut top_log_probs).into()),
                        top_count,
                        target_ranks: is_index.then_some(&mut target_ranks),
                        ..results!()
                    }
                };
            }
            let input = |x| Input::from(x).strides(strides);
            watch.call(&name("forward"), || {
                call.forward_with(input(&x[..]), targets, all_results!())
            });
            watch.call(&name("fused"), || {
                let grad = Output::from(&mut grad).strides(strides);
                let row_losses = Some((&mut losses).into());
                let results = Results { row_losses, ..Results::default() };
                call.forward_backward_with(input(&x[..]), targets, grad, results)
            });
            watch.call(&name("fused with every result"), || {
                let grad = Output::from(&mut grad).strides(strides);
                call.forward_backward_with(input(&x[..]), targets, grad, all_results!())
            });
            watch.call(&name("backward"), || {
                let grad = Output::from(&mut grad).strides(strides);
                call.backward(input(&x[..]), targets, &lse, grad)
            });
            if !log_probs {
                watch.call(&name("partial_forward"), || {
                    call.partial_forward(input(&x[..]), targets, 0, classes, &mut states)
                });
                watch.call(&name("partial_finish"), || {
                    call.partial_finish(targets, classes, &states, results!())
                });
                watch.call(&name("partial_backward"), || {
                    let grad = Output::from(&mut grad).strides(strides);
                    call.partial_backward(input(&x[..]), targets, 0, classes, &states, grad)
                });
            }
            if !is_index {
                watch.call(&name("backward_targets"), || {
                    let grad = Output::from(&mut grad_soft).strides(packed.strides());
                    call.backward_targets(input(&x[..]), targets, &lse, grad)
                });
            }
            if option != "accumulate" {
                watch.call(&name("fused in place"), || {
                    let to = Output::from(&mut y).strides(strides);
                    let row_losses = Some((&mut losses).into());
                    let results = Results { row_losses, ..Results::default() };
                    call.forward_backward_in_place_with(to, targets, results)
                });
                watch.call(&name("backward in place"), || {
                    let to = Output::from(&mut y).strides(strides);
                    call.backward_in_place(to, targets, &lse)
                });
            }
        }
        if !log_probs {
            let x = Input::from(&x).strides(strides);
            watch.call("lse", || call.lse(x, &mut lse));
        }
    }

    let mut softmax = Softmax::new(n, classes).inner(inner).isa(isa).threads(watch.team.threads());
    if let Team::Pool(pool) = watch.team {
        softmax = softmax.pool(pool);
    }
    let mut z = y.clone();
    macro_rules! at {
        ($data:expr) => {
            Output::from(&mut $data).strides(strides)
        };
        (in $data:expr) => {
            Input::from(&$data).strides(strides)
        };
    }
    watch.call("softmax", || softmax.softmax(at!(in x), at!(y)));
    watch.call("softmax_backward", || softmax.softmax_backward(at!(in y), at!(in x), at!(z)));
    watch
        .call("softmax_backward in place", || softmax.softmax_backward_in_place(at!(in y), at!(z)));
    watch.call("softmax in place", || softmax.softmax_in_place(at!(y)));
    watch.call("log_softmax", || softmax.log_softmax(at!(in x), at!(y)));
    watch.call("log_softmax_backward", || {
        softmax.log_softmax_backward(at!(in y), at!(in x), at!(z))
    });
    watch.call("log_softmax_backward over y", || {
        softmax.log_softmax_backward_over(at!(z), at!(in y))
    });
    watch.call("log_softmax in place", || softmax.log_softmax_in_place(at!(x)));
}

fn every_dtype<'a>(shape: &Shape, isa: Isa, team: Team<'a>) -> Watch<'a> {
    fn run<L: Float, G: Float>(shape: &Shape, isa: Isa, watch: &mut Watch<'_>) {
        let Shape { rows, classes, layout } = shape;
        let isa_name = isa.name();
        watch.at =
            format!("{} to {}, {rows}x{classes} as {layout:?}, {isa_name}", L::NAME, G::NAME);
        every_call::<L, G>(shape, isa, watch);
    }
    let most = Count { calls: 0, bytes: 0, largest: 0 };
    let mut watch = Watch { team, at: String::new(), calls: 0, with_jobs: 0, most };
    let dtypes = [run::<f32, f32>, run::<f64, f64>, run::<bf16, bf16>, run::<f16, f32>];
    for run in some(&dtypes) {
        run(shape, isa, &mut watch);
    }
    watch
}

fn isas() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
}

const LAYOUTS: [OperandLayout; 3] =
    [OperandLayout::Rows, OperandLayout::Positions, OperandLayout::Spread];

/// Small calls, which stay on the calling thread, allocate nothing. The first call of the process is one
/// of them.
fn small_calls_allocate_nothing() {
    let mut first = [0.5f32, 1.0, -1.0];
    let (result, count) =
        counted(|| CrossEntropy::new(1, 3).forward_backward_in_place(&mut first, &[1u8]));
    assert!(result.is_ok() && count.calls == 0, "the first call: {count:?}");
    let mut calls = 0;
    for layout in LAYOUTS {
        for (rows, classes) in [(1, 1), (7, 10), (64, 33), (20, 1000)] {
            for isa in isas() {
                calls += every_dtype(&Shape { rows, classes, layout }, isa, Team::Small).calls;
            }
        }
    }
    // Long rows are cut in the same way on every set. The last row is large, but forms one block, for which
    // no pool starts.
    let long = LAYOUTS
        .map(|layout| (layout, 100_000))
        .into_iter()
        .chain([(OperandLayout::Spread, 140_000)]);
    for (layout, classes) in common::some(long, 4) {
        let shape = Shape { rows: 1, classes, layout };
        calls += every_dtype(&shape, Isa::best(), Team::Small).calls;
    }
    println!("{calls} calls allocated nothing");
}

/// A large call that is told to stay on the calling thread allocates nothing.
fn calls_on_one_thread_allocate_nothing() {
    let mut calls = 0;
    for layout in some(&LAYOUTS) {
        for (rows, classes) in some(&[(20_000, 10), (200, 1000), (2, 100_000)]) {
            let rows = if is_sampled() { rows / 10 + 1 } else { rows };
            calls += every_dtype(&Shape { rows, classes, layout }, Isa::best(), Team::Alone).calls;
        }
    }
    println!("{calls} calls allocated nothing");
}

/// A call over threads allocates jobs and nothing else, whatever C and N·C are.
fn jobs_are_all_that_teams_allocate() {
    let own = Pool::new(THREADS).unwrap();
    // Start both pools, so that their threads have allocated what they keep.
    let mut warm = vec![0f32; 1 << 20];
    for pool in [None, Some(&own)] {
        let mut call = CrossEntropy::new(1 << 10, 1 << 10);
        if let Some(pool) = pool {
            call = call.pool(pool);
        }
        (0..if is_sampled() { 4 } else { 20 }).for_each(|_| {
            call.forward_backward_in_place(&mut warm, &[0i32; 1 << 10]).unwrap();
        });
    }
    let pooled = LAYOUTS.map(|layout| (layout, Team::Pool(&own))).into_iter();
    for (layout, team) in pooled.chain([(OperandLayout::Rows, Team::Global)]) {
        // Eight rows shorter than a segment go to threads one by one; fewer and longer rows are cut.
        for (rows, classes) in [(20_000, 10), (200, 1000), (8, 30_000), (2, 100_000), (1, 300_000)]
        {
            if is_sampled() && classes > 1000 && !matches!(team, Team::Global) {
                continue;
            }
            let shape = Shape { rows, classes, layout };
            let Watch { calls, with_jobs, most, .. } = every_dtype(&shape, Isa::best(), team);
            println!("{rows}x{classes} as {layout:?}: at most {most:?} in each of {calls} calls");
            // Up to 64 rows next to each other form one tile, for one thread.
            let is_split = matches!(layout, OperandLayout::Rows) || rows > 64;
            let has_team = matches!(team, Team::Pool(_)) || rayon::current_num_threads() > 1;
            if is_split && has_team {
                // Some calls of one row have no sweep.
                assert!(4 * with_jobs > calls, "{with_jobs} of {calls} calls are shared");
            }
        }
    }
}

/// A call that fails allocates a message, and no copy of an operand.
fn errors_allocate_a_message() {
    let (rows, classes) = (4, 250_000);
    let (mut x, targets) = (vec![0f32; rows * classes], [0, 0, 0, 300_000]);
    // A thread of the pool may allocate memory that it keeps while it goes to sleep; once.
    let least = |call: &mut dyn FnMut() -> Count| (0..5).map(|_| call().bytes).min().unwrap();
    let bytes = least(&mut || {
        let call = CrossEntropy::new(rows, classes);
        let (result, count) = counted(|| call.forward_backward_in_place(&mut x, &targets));
        assert!(matches!(result, Err(Error::Target { row: 3, .. })), "{result:?}");
        count
    });
    assert!(bytes <= JOBS, "{bytes}");
    let bytes = least(&mut || {
        let call = CrossEntropy::new(rows, classes).z_loss(-1.0);
        let (result, count) = counted(|| call.forward(&x, &targets));
        assert!(matches!(result, Err(Error::Param(_))), "{result:?}");
        count
    });
    assert!(bytes <= JOB, "{bytes}");
}

/// The peak of the memory in use by this process, and the memory in use now.
#[cfg(target_os = "linux")]
fn resident() -> [usize; 2] {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    ["VmHWM:", "VmRSS:"].map(|key| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
    })
}

/// 4 GiB of logits in place: the process's peak stays within 1 % of its buffers.
#[cfg(target_os = "linux")]
fn rss_of_4_gib_in_place() {
    let (rows, classes) = (4096, 262_144);
    let mut logits = vec![0f32; rows * classes];
    for (i, x) in logits.iter_mut().enumerate() {
        *x = (i.wrapping_mul(0x9e37_79b9) >> 8 & 0xff) as f32 / 16.0;
    }
    let targets: Vec<i32> = (0..rows as i32).map(|row| row * 61).collect();
    let buffers = size_of_val(&logits[..]) + size_of_val(&targets[..]);
    let [_, before] = resident();
    let loss =
        CrossEntropy::new(rows, classes).forward_backward_in_place(&mut logits, &targets).unwrap();
    let [peak, after] = resident();
    assert!(loss.is_finite() && after >= buffers);
    let [growth, whole] = [peak.saturating_sub(before), peak].map(|x| x as f64 / buffers as f64);
    println!(
        "buffers {buffers} bytes, resident before the call {before}, peak {peak}: \
         the call added {:.4} %, the process has {:.4} % of its buffers",
        growth * 100.0,
        whole * 100.0
    );
    assert!(growth <= 0.01 && whole <= 1.01, "peak {peak}, buffers {buffers}");
}

#[cfg(not(target_os = "linux"))]
fn rss_of_4_gib_in_place() {
    println!("skipped: reads /proc/self/status");
}

/// A large gradient along an inner axis of some hundred classes keeps the exponentials of a strip: a task
/// takes 96 KiB for them and gives them back, whatever N·C is.
fn exponentials_of_inner_positions() {
    const CLASSES: usize = 150;
    for positions in some(&[131_072, 150_000]) {
        let mut x = vec![0.5f32; CLASSES * positions];
        let targets: Vec<i32> = (0..positions).map(|i| (i % CLASSES) as i32).collect();
        let call = CrossEntropy::new(1, CLASSES).inner(positions).threads(1);
        let (result, count) =
            counted(|| call.forward_backward_in_place(Output::from(&mut x), &targets));
        result.unwrap();
        // A task is 8 tiles of 64 positions or more.
        let tasks = positions / (8 * 64) + 1;
        let some = (1..=tasks).contains(&count.calls);
        assert!(count.largest <= (96 << 10) + 64 && some, "{count:?}");
    }
}

/// A linear layer takes 2 MiB a thread for f32, and memory for its rows: with 2048 rows of 65,536 classes less than 2 %
/// of the logits that it does not store. A workspace bounds what it takes, and serves where it spares a product.
fn linear_layers_take_what_they_may() {
    const FEATURES: usize = 64;
    let own = Pool::new(THREADS).unwrap();
    let (rows, classes) = if is_sampled() { (96, 2048) } else { (2048, 65_536) };
    let value = |i: usize| (i.wrapping_mul(0x9e37_79b9) >> 8 & 0xff) as f32 / 256.0 - 0.5;
    let hidden: Vec<f32> = (0..rows * FEATURES).map(value).collect();
    let weight: Vec<f32> = (0..classes * FEATURES).map(value).collect();
    let targets: Vec<i32> = (0..rows).map(|row| (row * 7 % classes) as i32).collect();
    let (mut grad_hidden, mut grad_weight) = (hidden.clone(), weight.clone());
    let mut run_for = |workspace: usize, threads: u32, wants_weight: bool| {
        let call = CrossEntropy::new(rows, classes).pool(&own).threads(threads);
        let grads = LinearGrads {
            hidden: Some((&mut grad_hidden).into()),
            weight: wants_weight.then_some((&mut grad_weight).into()),
            ..LinearGrads::default()
        };
        let linear = Linear::new(call, FEATURES).workspace(workspace);
        counted(|| linear.forward_backward(&hidden, &weight, &targets, grads))
    };
    // Logits are kept only where they would be made again: not for the gradient of the hidden states alone.
    const WORKSPACE: usize = 128 << 20;
    let (_, kept) = run_for(WORKSPACE, 1, true);
    assert!((64 * classes * 4..=WORKSPACE).contains(&kept.bytes), "{kept:?} with a workspace");
    let [lean, roomy] = [0, WORKSPACE].map(|workspace| run_for(workspace, 1, false).1.bytes);
    assert_eq!(lean, roomy, "bytes for the gradient of the hidden states alone");
    let mut run = |workspace: usize, threads: u32| run_for(workspace, threads, true);
    for threads in [1, 3] {
        let (result, count) = run(0, threads);
        result.unwrap();
        let most = (2 << 20) * threads as usize + 150 * rows + JOBS;
        assert!(count.bytes <= most, "{count:?} of {most} on {threads} threads");
        if !is_sampled() {
            assert!(count.bytes <= rows * classes * 4 / 50, "{count:?}");
        }
        println!("{rows}x{classes} on {threads} threads: {count:?}");
    }
    let least_of = |result: Result<f64, Error>| {
        let message = result.unwrap_err().to_string();
        let mut words = message.split_whitespace().filter_map(|word| word.parse::<usize>().ok());
        words.find(|&bytes| bytes > 1).unwrap()
    };
    let least = least_of(run(1, 3).0);
    let (result, count) = run(least, 3);
    result.unwrap();
    assert!(count.bytes <= least, "{count:?} of {least}");

    // The largest logits of a row block have memory that counts, too.
    let mut top_classes = vec![0; rows * 64];
    let mut listing = |workspace: usize| {
        let call = CrossEntropy::new(rows, classes).pool(&own).threads(1);
        let top_classes = Some(&mut top_classes[..]);
        let results = Results { top_count: 64, top_classes, ..Results::default() };
        let linear = Linear::new(call, FEATURES).workspace(workspace);
        counted(|| linear.forward_with(&hidden, &weight, &targets, results).map(|()| 0.0))
    };
    let (result, count) = listing(0);
    result.unwrap();
    assert!(count.bytes <= (2 << 20) + 150 * rows + JOBS, "{count:?}");
    let least = least_of(listing(1).0);
    let (result, count) = listing(least);
    result.unwrap();
    assert!(count.bytes <= least, "{count:?} of {least}");
}

/// A test, and whether it runs by name only.
type Test = (&'static str, fn(), bool);

const TESTS: [Test; 7] = [
    ("linear_layers_take_what_they_may", linear_layers_take_what_they_may, false),
    ("exponentials_of_inner_positions", exponentials_of_inner_positions, false),
    ("small_calls_allocate_nothing", small_calls_allocate_nothing, false),
    ("calls_on_one_thread_allocate_nothing", calls_on_one_thread_allocate_nothing, false),
    ("jobs_are_all_that_teams_allocate", jobs_are_all_that_teams_allocate, false),
    ("errors_allocate_a_message", errors_allocate_a_message, false),
    ("rss_of_4_gib_in_place", rss_of_4_gib_in_place, true),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    let names: Vec<&String> = arguments.iter().filter(|word| !word.starts_with('-')).collect();
    for (name, run, ignored) in TESTS {
        if !names.is_empty() && !names.iter().any(|part| name.contains(*part)) {
            continue;
        }
        if has("--list") {
            println!("{name}: test");
        } else if has("--include-ignored") || ignored == has("--ignored") {
            println!("test {name} ...");
            run();
            println!("test {name} ... ok");
        } else if ignored {
            println!("test {name} ... ignored, run by name: --ignored {name}");
        }
    }
}
