//! The C interface, called with arbitrary descriptors over memory between guard pages. A call returns an
//! error code that the header allows and writes nothing, or returns a right answer.

mod abi;
mod answer;
mod arena;
mod call;
mod draw;
mod model;

use crate::bytes::Bytes;
use abi::{MEMBERS, View};
use arbitrary::{Arbitrary, Result, Unstructured};
use arena::{Arena, Snapshot};
use call::{Arguments, Entry, Handed};
use common::random::Rng;
use common::split::numbers;
use common::task::same_bits;
use draw::{REGIONS, STRUCTS};
use std::cell::RefCell;
use std::ffi::{CStr, c_void};
use std::fmt;
use std::ops::Range;
use std::ptr;
use std::sync::OnceLock;
use xent::Partial;

/// The bytes from which a call is drawn once its memory exists.
pub struct Input(Vec<u8>);

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Input(u.bytes(u.len())?.to_vec()))
    }
}

thread_local! {
    static ARENA: RefCell<Arena> = RefCell::new(Arena::new(REGIONS));
}

/// A pool of two threads that lives as long as the process.
fn pool() -> *const c_void {
    static POOL: OnceLock<usize> = OnceLock::new();
    let address = *POOL.get_or_init(|| abi::xent_pool_new(2).expose_provenance());
    ptr::with_exposed_provenance(address)
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        ARENA.with_borrow_mut(|arena| {
            let drawn = draw::call(&mut Bytes::new(&self.0), arena, pool());
            writeln!(f, "{:#?}", drawn.arguments)?;
            let (verdict, sizes) = (drawn.arguments.verdict(), drawn.arguments.sizes());
            for operand in drawn.arguments.operands() {
                writeln!(f, "{}: steps {:?}", operand.name, operand.steps(sizes))?;
            }
            writeln!(f, "may return {:?}", verdict.codes)
        })
    }
}

impl Input {
    pub fn check(&self) {
        ARENA.with_borrow_mut(|arena| {
            let drawn = draw::call(&mut Bytes::new(&self.0), arena, pool());
            let arguments = &drawn.arguments;
            if arguments.entry == Entry::PartialMerge {
                return merge(arguments, arena);
            }
            let mut verdict = arguments.verdict();
            if verdict.touches_memory() && !is_mapped(arguments, arena) {
                // The library cannot know this fault, and the header promises nothing of it.
                return;
            }
            let sizes = arguments.sizes();
            let pointers = hand_over(arguments, arena);
            let before = arena.snapshot();
            if verdict.touches_memory()
                && arguments.has_bad_target(|operand, at| answer::integer(&before, operand, at))
            {
                verdict.codes.retain(|&code| code != abi::OK);
                verdict.codes.push(abi::TARGET);
            }
            let code = make(arguments, &pointers);
            let after = arena.snapshot();
            assert!(verdict.codes.contains(&code), "returned {}, not {verdict:?}", name(code));
            if code != abi::OK {
                let changed = before.differs(&after, &[]);
                assert!(changed.is_none(), "{} and wrote at {changed:x?}", name(code));
                assert!(!last_error().is_empty(), "{} without a message", name(code));
                return;
            }
            let outputs: Vec<Range<usize>> = arguments
                .operands()
                .iter()
                .filter(|operand| operand.output && operand.is_present())
                .flat_map(|operand| operand.touched(sizes))
                .collect();
            let changed = before.differs(&after, &outputs);
            assert!(changed.is_none(), "an address that is no output's was written: {changed:x?}");
            answer::check_padding(arguments, &after);
            answer::check(arguments, drawn.is_unaliased, &before, &after);
        });
    }
}

/// Merges as many states as there are rows. The call cannot fail: nothing about it is hostile.
fn merge(arguments: &Arguments, arena: &mut Arena) {
    let count = arguments.problem.rows % 64;
    let mut rng = Rng::new(arguments.problem.classes as u64);
    let mut states = || {
        let mut state = |_| {
            let reals = [rng.uniform(-9.0, 9.0), rng.normal(), rng.uniform(0.0, 2.0), rng.normal()];
            let special = [f64::NEG_INFINITY, f64::INFINITY, f64::NAN, 0.0];
            let [lse, target_dot, target_mass, logit_mean] = reals;
            let lse = if rng.one_in(4) { special[rng.below(4)] } else { lse };
            let max = if rng.one_in(4) { special[rng.below(4)] } else { rng.normal() };
            let argmax = rng.below(99) as i64 - 1;
            let state = Partial { lse, target_dot, target_mass, logit_mean, max, argmax };
            if rng.one_in(6) { Partial::EMPTY } else { state }
        };
        (0..count).map(&mut state).collect::<Vec<Partial>>()
    };
    let (mut into, from) = (states(), states());
    let encode =
        |states: &[Partial]| -> Vec<u8> { states.iter().flat_map(|s| bytes_of(*s)).collect() };
    let mut place = |i: usize, states: &[Partial]| {
        let (bytes, region) = (encode(states), &mut arena.regions[i]);
        let at = region.end() - bytes.len();
        region.write(at, &bytes);
        at
    };
    let (to, of) = (place(0, &into), place(1, &from));
    let before = arena.snapshot();
    let (to_pointer, of_pointer) = (ptr::without_provenance_mut(to), ptr::without_provenance(of));
    // SAFETY: both arrays lie at the ends of their regions, as `place` wrote them.
    unsafe { abi::xent_partial_merge(to_pointer, of_pointer, count) };
    let after = arena.snapshot();
    let written = to..to + count * size_of::<Partial>();
    assert!(before.differs(&after, &[written]).is_none(), "more than the states was written");
    Partial::merge_all(&mut into, &from);
    for (i, (at, want)) in (to..).step_by(8 * MEMBERS).zip(&into).enumerate() {
        let got = answer::state(&after, at);
        same_bits(&numbers(&[got]), &numbers(&[*want]), &format!("state {i}"));
    }
}

fn name(code: i32) -> &'static str {
    // SAFETY: the header says that the string is static and never NULL.
    let name = unsafe { CStr::from_ptr(abi::xent_status_name(code)) };
    name.to_str().expect("names are ASCII")
}

fn last_error() -> String {
    // SAFETY: the header says that the string is never NULL and valid until this thread's next failure;
    // this thread makes no call meanwhile.
    let message = unsafe { CStr::from_ptr(abi::xent_last_error()) };
    message.to_str().expect("messages are UTF-8").to_string()
}

/// Every operand lies in one region, and has few enough elements.
fn is_mapped(arguments: &Arguments, arena: &Arena) -> bool {
    let sizes = arguments.sizes();
    arguments.operands().iter().filter(|operand| operand.is_present()).all(|operand| {
        let [rows, classes, inner] = operand.sizes(sizes);
        if rows.saturating_mul(inner).saturating_mul(classes) == 0 {
            // An operand without elements may point anywhere; its rows are still bounded.
            let own = operand.sizes(sizes);
            return sizes.iter().chain(&own).all(|&size| size <= model::MOST);
        }
        let count = rows.saturating_mul(classes).saturating_mul(inner);
        count <= model::MOST && arena.find(&operand.span(sizes)).is_some()
    })
}

/// The addresses of the arguments' structs.
struct Pointers {
    first: *const c_void,
    results: *const c_void,
    linear: *const c_void,
    grads: *const c_void,
    views: [*const c_void; 3],
}

/// Puts the structs at the ends of their regions.
fn hand_over(arguments: &Arguments, arena: &mut Arena) -> Pointers {
    let mut next = STRUCTS;
    let mut put = |handed: Handed, bytes: &[u8]| {
        let Handed::Sized { size, clean } = handed else { return ptr::null() };
        let region = &mut arena.regions[next];
        next += 1;
        let size = (size as usize).max(size_of::<u32>());
        let mut all = vec![0; size];
        let own = size.min(bytes.len());
        all[..own].copy_from_slice(&bytes[..own]);
        if let (false, Some(last)) = (clean, all[own..].last_mut()) {
            *last = 1;
        }
        let at = region.end() - size;
        region.write(at, &all);
        ptr::without_provenance(at)
    };
    let size_of_first = |handed: Handed| match handed {
        Handed::Sized { size, .. } => size,
        Handed::Null => 0,
    };
    let p = &arguments.problem;
    let struct_size = size_of_first(arguments.first);
    let first = if arguments.is_softmax() {
        let shape = abi::Shape {
            struct_size,
            flags: p.flags,
            rows: p.rows,
            classes: p.classes,
            inner: p.inner,
            threads: p.threads,
            pool: p.pool,
        };
        put(arguments.first, &bytes_of(shape))
    } else {
        put(arguments.first, &bytes_of(abi::Problem { struct_size, ..*p }))
    };
    let struct_size = size_of_first(arguments.results_handed);
    let results =
        put(arguments.results_handed, &bytes_of(abi::Results { struct_size, ..arguments.results }));
    let (mut linear, mut grads) = (ptr::null(), ptr::null());
    if arguments.is_linear() {
        let struct_size = size_of_first(arguments.linear_handed);
        linear = put(
            arguments.linear_handed,
            &bytes_of(abi::Linear { struct_size, ..arguments.linear }),
        );
        let struct_size = size_of_first(arguments.grads_handed);
        grads = put(
            arguments.grads_handed,
            &bytes_of(abi::LinearGrads { struct_size, ..arguments.grads }),
        );
    }
    let views = if arguments.is_softmax() {
        [arguments.x, arguments.grad_y, arguments.y]
    } else {
        [arguments.grad_output, arguments.grad, None]
    };
    let views = views.map(|view| match view {
        Some(view) => {
            let size = size_of::<View>() as u32;
            put(Handed::Sized { size, clean: true }, &bytes_of(view))
        }
        None => ptr::null(),
    });
    Pointers { first, results, linear, grads, views }
}

/// The bytes of a struct of the interface, padding zeroed.
fn bytes_of<T: Copy>(value: T) -> Vec<u8> {
    let mut bytes = vec![0u8; size_of::<T>()];
    // SAFETY: both have the size of the struct. Padding is copied and never read.
    unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(value) };
    bytes
}

fn make(arguments: &Arguments, pointers: &Pointers) -> i32 {
    let Pointers { first, results, linear, grads, views: [a, b, c] } = *pointers;
    let (lse, scale) = (arguments.lse, arguments.grad_scale);
    let (offset, total, states) =
        (arguments.class_offset, arguments.total_classes, arguments.states);
    // SAFETY: each pointer leads to a struct of the size that it says. Each operand lies in mapped memory,
    // or the header says that the call refuses it.
    unsafe {
        match arguments.entry {
            Entry::Forward => abi::xent_forward(first, results),
            Entry::Backward => abi::xent_backward(first, lse, a, scale, b),
            Entry::BackwardTargets => abi::xent_backward_targets(first, lse, a, scale, b),
            Entry::ForwardBackward => abi::xent_forward_backward(first, a, scale, results, b),
            Entry::LogSoftmax => abi::xent_log_softmax(first, a, c),
            Entry::LogSoftmaxBackward => abi::xent_log_softmax_backward(first, a, b, c),
            Entry::Softmax => abi::xent_softmax(first, a, c),
            Entry::SoftmaxBackward => abi::xent_softmax_backward(first, a, b, c),
            Entry::LinearForward => abi::xent_linear_forward(first, linear, results),
            Entry::LinearBackward => abi::xent_linear_backward(first, linear, lse, a, scale, grads),
            Entry::LinearForwardBackward => {
                abi::xent_linear_forward_backward(first, linear, a, scale, results, grads)
            }
            Entry::PartialForward => abi::xent_partial_forward(first, offset, total, states),
            Entry::PartialFinish => abi::xent_partial_finish(first, total, states, results),
            Entry::PartialBackward => {
                abi::xent_partial_backward(first, offset, total, states, a, scale, b)
            }
            Entry::LinearPartialForward => {
                abi::xent_linear_partial_forward(first, linear, offset, total, states)
            }
            Entry::LinearPartialBackward => abi::xent_linear_partial_backward(
                first, linear, offset, total, states, a, scale, grads,
            ),
            Entry::PartialMerge => unreachable!("it has a check of its own"),
        }
    }
}
