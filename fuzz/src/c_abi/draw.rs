//! Arguments, mostly valid and with a few faults, and the memory behind them.

use super::abi::{self, Linear, LinearGrads, MEMBERS, Problem, Results, Shape, View};
use super::arena::{Arena, BYTES};
use super::call::{Arguments, ENTRIES, Entry, Handed};
use super::model::{self, Axes, Operand, size_of_dtype};
use crate::bytes::Bytes;
use crate::values;
use common::operand::{Dtype, FLOATS, INTEGERS};
use common::random::Rng;
use std::ffi::c_void;
use std::ptr;
use xent::half::{bf16, f16};

/// Regions: one for each operand in its turn, then the structs.
pub const REGIONS: usize = 40;

/// Of the structs' regions: the problem or shape, the results, the layer, its gradients, and views.
pub const STRUCTS: usize = 32;

/// A drawn call.
pub struct Drawn {
    pub arguments: Arguments,
    /// No operand shares memory with another, so that each holds the numbers drawn for it.
    pub is_unaliased: bool,
}

/// The rate of faults.
struct Hostile<'a, 'b> {
    bytes: &'a mut Bytes<'b>,
    /// No fault, one choice in sixteen, or one in four.
    one_in: usize,
}

impl Hostile<'_, '_> {
    fn strikes(&mut self) -> bool {
        self.one_in > 0 && self.bytes.one_in(self.one_in)
    }
}

const SIZES: [usize; 12] = [
    0,
    usize::MAX,
    1 << 63,
    1 << 62,
    1 << 60,
    (1 << 59) - 1,
    1 << 59,
    1 << 40,
    1 << 32,
    (1 << 31) + 1,
    usize::MAX / 3,
    1 << 21,
];

const STRIDES: [i64; 20] = [
    0,
    -1,
    1,
    2,
    i64::MIN,
    i64::MAX,
    i64::MAX / 2,
    i64::MAX / 8,
    1 << 62,
    1 << 61,
    1 << 60,
    1 << 59,
    1 << 48,
    1 << 32,
    1 << 31,
    -2,
    3,
    7,
    64,
    -(1 << 40),
];

const REALS: [f64; 14] = [
    f64::NAN,
    f64::INFINITY,
    f64::NEG_INFINITY,
    -1.0,
    -0.0,
    0.0,
    1.0,
    1.0000001,
    2.0,
    -1e-300,
    1e300,
    5e-324,
    f64::MAX,
    0.5,
];

const DTYPES: [u32; 16] =
    [0, 1, 2, 3, 16, 17, 18, 19, 20, 4, 15, 21, 255, u32::MAX, 1 << 31, 0x100];

/// Draws a call and fills the arena with its operands.
pub fn call(bytes: &mut Bytes, arena: &mut Arena, pool: *const c_void) -> Drawn {
    let entry = bytes.pick(&ENTRIES);
    let seed = u64::from(bytes.byte());
    let one_in = bytes.pick(&[0, 24, 8, 64, 3]);
    let mut hostile = Hostile { bytes, one_in };
    let h = &mut hostile;

    let shape = |h: &mut Hostile, usual: &[usize]| {
        if h.strikes() { h.bytes.pick(&SIZES) } else { h.bytes.pick(usual) }
    };
    let rows = shape(h, &[2, 1, 3, 4, 5, 7, 8, 9, 17, 33, 64, 65]);
    let classes = shape(h, &[3, 1, 2, 5, 8, 10, 31, 32, 33, 34, 40, 64, 65, 97, 130, 257]);
    let inner = shape(h, &[1, 1, 1, 2, 3, 5, 9, 17]);
    let is_linear = Entry::is_linear(entry);
    let has_states = Entry::has_states(entry);
    let inner = if is_linear && !h.strikes() { 1 } else { inner };
    // A shard may have no classes.
    let classes = if has_states && h.bytes.one_in(8) { 0 } else { classes };
    // Operands of f64 fit their regions, unless the fault is that they do not.
    let small = |n: usize| n <= 1 << 10;
    let (rows, inner) = if small(rows) && small(classes) && small(inner) {
        let inner = inner.min((1500 / classes.max(1)).max(1));
        (rows.min((1500 / (classes * inner).max(1)).max(1)), inner)
    } else {
        (rows, inner)
    };
    let mut features = 0;
    if is_linear {
        features = shape(h, &[3, 1, 2, 4, 8, 15, 16, 17, 33, 64, 65]);
        if small(rows) && small(classes) && small(features) {
            features = features.min((1500 / rows.max(classes).max(1)).max(1));
        }
    }
    let (mut class_offset, mut total_classes) = (0, classes);
    if has_states {
        class_offset = shape(h, &[0, 1, 5, 64]);
        let more = h.bytes.pick(&[0, 0, 1, 7, 40]);
        total_classes = class_offset.wrapping_add(classes).wrapping_add(more).max(1);
        if h.strikes() {
            total_classes = h.bytes.pick(&SIZES);
        }
    }

    let mut problem = Problem {
        struct_size: size_of::<Problem>() as u32,
        flags: h.bytes.pick(&[0, 0, 8, 2, 4, 1, 3, 6, 5]),
        rows,
        classes,
        inner,
        logits: View::ABSENT,
        targets: View::ABSENT,
        class_weights: View::ABSENT,
        row_weights: View::ABSENT,
        row_mask: View::ABSENT,
        ignore_index: h.bytes.pick(&[-100, 0, 1, -1, 255, i64::MIN, 1 << 40]),
        label_smoothing: h.bytes.pick(&[0.0, 0.1, 1.0, 0.5]),
        z_loss: h.bytes.pick(&[0.0, 0.0, 1e-4, 2.0]),
        softcap: h.bytes.pick(&[0.0, 0.0, 30.0, 0.5]),
        logit_scale: h.bytes.pick(&[1.0, 1.0, 0.5, 3.0]),
        normalizer: h.bytes.pick(&[0.0, 0.0, 7.5]),
        z_normalizer: h.bytes.pick(&[0.0, 0.0, 3.25]),
        reduction: h.bytes.pick(&[0, 1, 2]),
        threads: h.bytes.pick(&[1, 0, 2, 3, u32::MAX]),
        pool: if h.bytes.flag() { pool } else { ptr::null() },
        target_classes: View::ABSENT,
        target_count: 0,
        target_scale: 0.0,
        entropy_bonus: 0.0,
    };
    if problem.flags & abi::LOG_PROBS != 0 && !h.strikes() {
        (problem.z_loss, problem.softcap, problem.logit_scale) = (0.0, 0.0, 1.0);
    }
    if has_states && !h.strikes() {
        problem.flags &= !abi::LOG_PROBS;
    }
    if is_linear && !h.strikes() {
        problem.flags &= abi::EMPTY_IS_ZERO;
    }
    let is_softmax = ENTRIES[4..8].contains(&entry);
    if is_softmax && !h.strikes() {
        problem.flags = 0;
    }
    for real in [
        &mut problem.label_smoothing,
        &mut problem.z_loss,
        &mut problem.softcap,
        &mut problem.logit_scale,
        &mut problem.normalizer,
        &mut problem.z_normalizer,
    ] {
        if h.strikes() {
            *real = h.bytes.pick(&REALS);
        }
    }
    let mut grad_scale = h.bytes.pick(&[1.0, -0.375, 0.0, 65536.0]);
    if h.strikes() {
        grad_scale = h.bytes.pick(&REALS);
    }
    if h.strikes() {
        problem.reduction = h.bytes.pick(&[3, u32::MAX, 255]);
    }
    if h.strikes() {
        problem.flags |= h.bytes.pick(&[8, 1 << 31, 0x10, 1]);
    }

    let mut results = Results {
        struct_size: size_of::<Results>() as u32,
        loss: ptr::null_mut(),
        row_losses: View::ABSENT,
        lse: ptr::null_mut(),
        z_loss: ptr::null_mut(),
        normalizer: ptr::null_mut(),
        z_normalizer: ptr::null_mut(),
        kept_rows: ptr::null_mut(),
        argmax: ptr::null_mut(),
        correct: ptr::null_mut(),
        entropy: View::ABSENT,
        kl: View::ABSENT,
        entropy_bonus: ptr::null_mut(),
        top_classes: ptr::null_mut(),
        top_log_probs: View::ABSENT,
        top_count: 0,
        target_ranks: ptr::null_mut(),
    };

    // The dtypes of the operands, before any fault.
    let float = h.bytes.pick(&[0, 1, 2, 3]);
    let target_dtype = h.bytes.pick(&[16, 17, 18, 19, 20, 0, 1, 2, 3]);
    let long = matches!(float, 2 | 3) && h.bytes.flag();
    let by_row = problem.reduction == 2;
    let present = h.bytes.byte();
    let asked = h.bytes.word();
    for region in &mut arena.regions {
        region.fill(0x5a);
    }
    let mut place = Placer {
        arena,
        rng: Rng::new(seed),
        sizes: [rows, classes, inner],
        all_classes: total_classes,
        unused: problem.ignore_index,
        next: 0,
        unaliased: true,
    };

    let logits = match is_linear && !h.strikes() {
        true => View::ABSENT,
        false => place.draw(h, "logits", float, Axes::Full, false),
    };
    problem.logits = logits;
    let linear = Linear {
        struct_size: 0,
        flags: 0,
        features,
        hidden: View::ABSENT,
        weight: View::ABSENT,
        bias: View::ABSENT,
        workspace: 0,
    };
    let grads = LinearGrads {
        struct_size: 0,
        hidden: View::ABSENT,
        weight: View::ABSENT,
        bias: View::ABSENT,
    };
    let mut arguments = Arguments {
        entry,
        first: handed(h, size_of::<Problem>()),
        problem,
        results,
        results_handed: handed(h, size_of::<Results>()),
        linear,
        linear_handed: Handed::Null,
        grads,
        grads_handed: Handed::Null,
        class_offset,
        total_classes,
        states: ptr::null_mut(),
        grad_output: None,
        grad: None,
        lse: ptr::null_mut(),
        grad_scale,
        x: None,
        grad_y: None,
        y: None,
    };
    if is_softmax {
        arguments.first = handed(h, size_of::<Shape>());
        let view = |h: &mut Hostile, view: View| (!h.strikes()).then_some(view);
        let grad_y = place.draw(h, "grad_y", float, Axes::Full, false);
        let y = match h.bytes.pick(&[0, 0, 1, 2]) {
            1 => logits,
            2 if arguments.is_softmax_backward() => grad_y,
            _ => place.draw(h, "y", float, Axes::Full, true),
        };
        arguments.x = view(h, logits);
        arguments.grad_y = view(h, grad_y);
        arguments.y = view(h, y);
        let is_unaliased = place.unaliased;
        return Drawn { arguments, is_unaliased };
    }

    if is_linear {
        arguments.linear_handed = handed(h, size_of::<Linear>());
        arguments.grads_handed = handed(h, size_of::<LinearGrads>());
        let (of_rows, of_classes) = (Axes::RowFeatures(features), Axes::ClassFeatures(features));
        let layer = &mut arguments.linear;
        layer.flags = h.bytes.pick(&[0, 0, 1, 2, 4, 7]);
        if h.strikes() {
            layer.flags = h.bytes.pick(&[8, 1 << 31, u32::MAX]);
        }
        layer.workspace = h.bytes.pick(&[0, 0, 64 << 20, 1 << 20, 1 << 22]);
        if h.strikes() {
            layer.workspace = h.bytes.pick(&[1, 1000, usize::MAX, 1 << 62]);
        }
        layer.hidden = place.draw_matrix(h, "hidden", float, of_rows, false);
        layer.weight = place.draw_matrix(h, "weight", float, of_classes, false);
        if present & 32 != 0 {
            let dtype = h.bytes.pick(&[0, 1, 2, 3]);
            layer.bias = place.draw(h, "bias", dtype, Axes::Classes, false);
        }
        if arguments.has_gradient() {
            let absent = h.bytes.byte();
            let grads = &mut arguments.grads;
            let dtype = if long { 0 } else { float };
            if absent & 3 != 3 {
                grads.hidden = place.draw_matrix(h, "grads.hidden", dtype, of_rows, true);
            }
            if absent & 12 != 12 {
                grads.weight = place.draw_matrix(h, "grads.weight", float, of_classes, true);
            }
            if absent & 48 != 48 {
                let dtype = h.bytes.pick(&[0, 1, 2, 3]);
                grads.bias = place.draw(h, "grads.bias", dtype, Axes::Classes, true);
            }
        }
    }
    if has_states {
        let count = rows.saturating_mul(inner).saturating_mul(MEMBERS);
        let name = if arguments.writes_states() { "partials" } else { "merged" };
        let axes = Axes::Elements(count);
        arguments.states = place.draw_packed(h, name, abi::F64, axes, name == "partials");
    }

    let p = &mut problem;
    let target_axes = if matches!(target_dtype, 0..=3) { Axes::Full } else { Axes::Rows };
    if asked & 1 == 0 || arguments.has_gradient() {
        p.targets = place.draw(h, "targets", target_dtype, target_axes, false);
    }
    if present & 1 != 0 {
        let dtype = h.bytes.pick(&[0, 1, 2, 3]);
        let axes = if has_states { Axes::Elements(total_classes) } else { Axes::Classes };
        p.class_weights = place.draw(h, "class_weights", dtype, axes, false);
    }
    if present & 2 != 0 {
        let dtype = h.bytes.pick(&[0, 1, 2, 3]);
        p.row_weights = place.draw(h, "row_weights", dtype, Axes::Rows, false);
    }
    if present & 4 != 0 {
        p.row_mask = place.draw(h, "row_mask", abi::U8, Axes::Rows, false);
    }
    if arguments.has_gradient() {
        if present & 8 != 0 {
            let dtype = h.bytes.pick(&[0, 1, 2, 3]);
            let axes = if by_row { Axes::Rows } else { Axes::One };
            arguments.grad_output = Some(place.draw(h, "grad_output", dtype, axes, false));
        }
        let grad = if present & 16 != 0 && entry != Entry::BackwardTargets {
            logits
        } else if is_linear {
            View::ABSENT
        } else {
            let dtype = if entry == Entry::BackwardTargets {
                h.bytes.pick(&[0, 1, 2, 3])
            } else if long {
                0
            } else {
                float
            };
            place.draw(h, "grad", dtype, Axes::Full, true)
        };
        arguments.grad = (!h.strikes()).then_some(grad);
    }
    if !arguments.has_results() && !has_states {
        arguments.lse = place.draw(h, "lse", abi::F64, Axes::Rows, false).data;
    }
    let r = &mut results;
    let to = |bit: usize, h: &mut Hostile, place: &mut Placer, dtype: u32, axes: Axes| {
        if asked & bit == 0 && !h.strikes() {
            return ptr::null_mut();
        }
        place.draw_packed(h, "", dtype, axes, true)
    };
    let can_reduce = !by_row;
    let has_lse = p.flags & abi::LOG_PROBS == 0;
    let has_targets = !p.targets.data.is_null();
    let when = |condition: bool, bit: usize| if condition { bit } else { 0 };
    r.loss = to(when(can_reduce && has_targets, 2), h, &mut place, abi::F64, Axes::One);
    r.lse = to(when(has_lse, 4), h, &mut place, abi::F64, Axes::Rows);
    r.z_loss =
        to(when(can_reduce && has_lse && has_targets, 8), h, &mut place, abi::F64, Axes::One);
    r.normalizer = to(when(has_targets, 16), h, &mut place, abi::F64, Axes::One);
    r.z_normalizer = to(when(has_targets, 32), h, &mut place, abi::F64, Axes::One);
    r.kept_rows = to(when(has_targets, 64), h, &mut place, abi::I64, Axes::One);
    r.argmax = to(128, h, &mut place, abi::I64, Axes::Rows);
    r.correct =
        to(when(has_targets && target_axes == Axes::Rows, 256), h, &mut place, abi::I64, Axes::One);
    if asked & when(has_targets, 512) != 0 {
        let dtype = h.bytes.pick(&[0, 1]);
        r.row_losses = place.draw(h, "row_losses", dtype, Axes::Rows, true);
    }
    if asked & when(has_lse, 1024) != 0 {
        let dtype = h.bytes.pick(&[0, 1]);
        r.entropy = place.draw(h, "entropy", dtype, Axes::Rows, true);
    }
    if asked & (2048 | 4096) != 0 {
        r.top_count = h.bytes.pick(&[1, 2, 5, 64]).min(p.classes);
        if h.strikes() {
            r.top_count = h.bytes.pick(&[0, 65, p.classes.wrapping_add(1), usize::MAX]);
        }
        let top = Axes::PerRow(r.top_count.min(p.classes));
        if asked & 2048 != 0 {
            r.top_classes = place.draw_packed(h, "", abi::I64, top, true);
        }
        if asked & 4096 != 0 {
            let dtype = h.bytes.pick(&[0, 1]);
            r.top_log_probs = place.draw(h, "top_log_probs", dtype, top, true);
        }
    }
    let has_indices = has_targets && target_axes == Axes::Rows;
    r.target_ranks = to(when(has_indices, 8192), h, &mut place, abi::I64, Axes::Rows);
    // Drawn last, so that older seeds still make the same calls.
    r.entropy_bonus =
        to(when(can_reduce && has_lse && has_targets, 2048), h, &mut place, abi::F64, Axes::One);
    problem.entropy_bonus = h.bytes.pick(&[0.0, 0.0, 0.01, -2.0]);
    if !has_lse && !h.strikes() {
        problem.entropy_bonus = 0.0;
    }
    if h.strikes() {
        problem.entropy_bonus = h.bytes.pick(&REALS);
    }
    let has_probabilities = has_targets && target_axes == Axes::Full;
    if asked & when(has_probabilities, 16384) != 0 || h.strikes() {
        let dtype = h.bytes.pick(&[0, 1]);
        if !has_states || h.strikes() {
            results.kl = place.draw(h, "kl", dtype, Axes::Rows, true);
        }
    }
    let takes_others = has_probabilities && entry != Entry::BackwardTargets;
    draw_distillation(h, &mut place, &mut problem, takes_others, has_states);
    // Members that the caller's header does not know, in whole or in part.
    let knows = |handed: Handed, own: usize| match handed {
        Handed::Sized { size, .. } => size as usize >= own,
        Handed::Null => true,
    };
    if !knows(arguments.first, size_of::<Problem>()) {
        problem.target_classes = View::ABSENT;
        (problem.target_count, problem.target_scale) = (0, 0.0);
        problem.entropy_bonus = 0.0;
    }
    if !knows(arguments.results_handed, size_of::<Results>()) {
        (results.kl, results.top_log_probs) = (View::ABSENT, View::ABSENT);
        results.entropy_bonus = ptr::null_mut();
        (results.top_classes, results.target_ranks) = (ptr::null_mut(), ptr::null_mut());
        results.top_count = 0;
    }
    let is_unaliased = place.unaliased;
    arguments.problem = problem;
    arguments.results = results;
    Drawn { arguments, is_unaliased }
}

/// Mostly of targets that are probabilities, makes some those of listed classes, or a teacher's logits.
fn draw_distillation(
    h: &mut Hostile,
    place: &mut Placer,
    problem: &mut Problem,
    has_probabilities: bool,
    has_states: bool,
) {
    let is_apt = has_probabilities || h.strikes();
    let is_sparse = is_apt && h.bytes.flag();
    // A shard has no teacher of all classes.
    let scale = h.bytes.pick(&[0.0, 1.0, 0.5, 0.7]);
    if is_apt && (is_sparse || !has_states || h.strikes()) {
        problem.target_scale = scale;
    }
    let name = if problem.target_scale > 0.0 { "teacher" } else { "targets" };
    if is_sparse {
        let rows = problem.rows.saturating_mul(problem.inner).max(1);
        let mut count = h.bytes.pick(&[2, 1, 3, 5, 8, 40, 257]).min((1500 / rows).max(1));
        if h.strikes() {
            count = h.bytes.pick(&SIZES);
        }
        let axes = Axes::PerRow(count);
        problem.target_count = count;
        let dtype = h.bytes.pick(&[16, 17, 18, 19, 20]);
        problem.target_classes = place.draw(h, "target_classes", dtype, axes, false);
        let dtype = h.bytes.pick(&[0, 1, 2, 3]);
        problem.targets = place.draw(h, name, dtype, axes, false);
    } else if problem.target_scale > 0.0 && has_probabilities {
        let dtype = problem.targets.dtype;
        problem.targets = place.draw(h, name, dtype, Axes::Full, false);
    }
    if h.strikes() {
        problem.target_scale = h.bytes.pick(&REALS);
    }
    if h.strikes() {
        problem.target_count = h.bytes.pick(&SIZES);
    }
    if h.strikes() {
        problem.target_classes.data = ptr::null_mut();
    }
    if h.strikes() {
        problem.targets.data = ptr::null_mut();
    }
}

/// The way in which a struct of `own` bytes is passed.
fn handed(h: &mut Hostile, own: usize) -> Handed {
    let own = own as u32;
    if h.bytes.one_in(16) {
        // A later header, whose new members have their defaults.
        return Handed::Sized { size: own + 8 * u32::from(h.bytes.byte() % 30), clean: true };
    }
    if !h.strikes() {
        return Handed::Sized { size: own, clean: true };
    }
    let clean = h.bytes.flag();
    match h.bytes.below(12) {
        0 => Handed::Null,
        1 => Handed::Sized { size: 0, clean },
        2 => Handed::Sized { size: own - 8, clean },
        3 => Handed::Sized { size: own - 1, clean },
        4 => Handed::Sized { size: own + 1, clean },
        5 => Handed::Sized { size: own + 8, clean },
        6 => Handed::Sized { size: own + 1000, clean },
        7 => Handed::Sized { size: 4, clean },
        8 => Handed::Sized { size: 1, clean },
        9 => Handed::Sized { size: u32::from(h.bytes.byte()) % own, clean },
        10 => Handed::Sized { size: own + u32::from(h.bytes.byte()), clean },
        _ => Handed::Sized { size: 2000, clean },
    }
}

/// Gives operands their places.
struct Placer<'a> {
    arena: &'a mut Arena,
    rng: Rng,
    sizes: model::Sizes,
    /// The classes that target indices are of.
    all_classes: usize,
    /// The class of an unused place of sparse targets.
    unused: i64,
    next: usize,
    unaliased: bool,
}

/// An operand that has no address yet.
fn unplaced(name: &'static str, dtype: u32, axes: Axes, output: bool) -> Operand {
    Operand {
        name,
        view: View { data: ptr::null_mut(), dtype, strides: [0; 3] },
        axes,
        allowed: &[],
        required: false,
        output,
        replaceable: false,
        replaces: false,
        fills_padding: false,
    }
}

impl Placer<'_> {
    /// Any strides and any address, mostly of an operand that fits its region.
    fn draw(
        &mut self,
        h: &mut Hostile,
        name: &'static str,
        dtype: u32,
        axes: Axes,
        output: bool,
    ) -> View {
        let dtype = if h.strikes() { h.bytes.pick(&DTYPES) } else { dtype };
        let operand = unplaced(name, dtype, axes, output);
        let sizes = operand.sizes(self.sizes);
        let mut strides = [0i64; 3];
        match h.bytes.below(6) {
            0..3 => {}
            way => {
                let order = [[0, 1, 2], [0, 2, 1], [2, 1, 0]][way - 3];
                let mut next = 1 + i64::from(h.bytes.one_in(6));
                for axis in order.into_iter().rev() {
                    strides[axis] = next;
                    let gap = h.bytes.pick(&[0, 0, 1, 3]);
                    let size = i64::try_from(sizes[axis]).unwrap_or(i64::MAX);
                    next = next.saturating_mul(size).saturating_add(gap);
                }
            }
        }
        for stride in &mut strides {
            if h.strikes() {
                *stride = h.bytes.pick(&STRIDES);
            }
        }
        let view = View { strides, ..operand.view };
        self.put(h, Operand { view, ..operand })
    }

    /// A matrix whose features are side by side, mostly.
    fn draw_matrix(
        &mut self,
        h: &mut Hostile,
        name: &'static str,
        dtype: u32,
        axes: Axes,
        output: bool,
    ) -> View {
        if h.strikes() {
            return self.draw(h, name, dtype, axes, output);
        }
        let operand = unplaced(name, dtype, axes, output);
        let width = operand.sizes(self.sizes)[1];
        let mut view = operand.view;
        if h.bytes.flag() {
            let pitch = i64::try_from(width).unwrap_or(i64::MAX);
            let pitch = pitch.saturating_add(h.bytes.pick(&[0, 1, 3, 16]));
            view.strides = [pitch, 1, h.bytes.pick(&[0, 7, -1])];
        }
        self.put(h, Operand { view, ..operand })
    }

    fn draw_packed(
        &mut self,
        h: &mut Hostile,
        name: &'static str,
        dtype: u32,
        axes: Axes,
        output: bool,
    ) -> *mut c_void {
        let view = View { data: ptr::null_mut(), dtype, strides: [0; 3] };
        let operand = Operand {
            name,
            view,
            axes,
            allowed: &[],
            required: false,
            output,
            replaceable: false,
            replaces: false,
            fills_padding: false,
        };
        self.put(h, operand).data
    }

    /// At the end of a region of its own, or at its start, or somewhere else.
    fn put(&mut self, h: &mut Hostile, operand: Operand) -> View {
        let own = self.next % STRUCTS;
        self.next += 1;
        let alias = h.strikes();
        let index = if alias { h.bytes.below(self.next.min(STRUCTS)) } else { own };
        self.unaliased &= !alias;
        let region = &mut self.arena.regions[index];
        let (start, end) = (region.start(), region.end());
        let element = size_of_dtype(operand.view.dtype);
        // The bytes that a valid operand takes.
        let steps = operand.steps(self.sizes);
        let sizes = operand.sizes(self.sizes);
        let last = operand.last(self.sizes);
        let bytes = last.saturating_add(1).saturating_mul(element as i128);
        let fits = !sizes.contains(&0)
            && sizes.iter().fold(1usize, |n, &size| n.saturating_mul(size)) <= model::MOST
            && steps.iter().all(|&step| step >= 0)
            && bytes <= BYTES as i128;
        let mut address = match fits {
            true if h.bytes.flag() => start,
            true => end - bytes as usize,
            false => start,
        };
        if h.strikes() {
            let room = 32;
            address = match h.bytes.below(8) {
                0 => 0,
                1 => address + 1,
                2 => address.wrapping_sub(1),
                3 => address.wrapping_sub(element * h.bytes.below(room)),
                4 => address.wrapping_add(element * h.bytes.below(room)),
                5 => 8,
                6 => usize::MAX - 7,
                _ => 1 << 47,
            };
        }
        let view = View { data: ptr::without_provenance_mut(address), ..operand.view };
        let operand = Operand { view, ..operand };
        // Outputs stay poisoned.
        let holds_numbers = !operand.output || operand.name.starts_with("grad");
        if fits && holds_numbers && self.arena.regions[index].contains(&operand.span(self.sizes)) {
            self.fill(h, &operand, index);
        }
        view
    }

    fn fill(&mut self, h: &mut Hostile, operand: &Operand, region: usize) {
        let classes = self.all_classes.max(1);
        let deviation =
            if operand.name == "logits" { h.bytes.pick(&[1.0, 5.0, 0.0, 30.0]) } else { 1.0 };
        let mut special = if operand.name == "logits" && h.bytes.one_in(4) {
            Some(values::logit(h.bytes))
        } else {
            None
        };
        values::keep_sums_finite(special.as_mut_slice());
        if operand.name == "teacher" && h.bytes.one_in(6) {
            let odd = [f64::NEG_INFINITY, f64::NAN, f64::INFINITY, 1e4, -1e4, 1e30, -1e30];
            special = Some(h.bytes.pick(&odd));
        }
        let bad_target = h.strikes();
        let is_target = matches!(operand.name, "targets" | "target_classes");
        let Some(dtype) = dtype_of(operand.view.dtype) else { return };
        let rng = &mut self.rng;
        let places = operand.places(self.sizes);
        let count = places.len();
        for (i, at) in places.into_iter().enumerate() {
            let x = match operand.name {
                "targets" if !dtype.is_float() => match rng.below(8) {
                    0 => -100.0,
                    _ => rng.below(classes) as f64,
                },
                "targets" => rng.uniform(0.0, 1.0),
                "target_classes" => match rng.below(4) {
                    0 if holds(dtype, self.unused) => self.unused as f64,
                    _ => rng.below(classes) as f64,
                },
                "teacher" => rng.normal() * 3.0,
                "row_mask" => [1.0, 0.0, 255.0, 1.0][rng.below(4)],
                "class_weights" | "row_weights" => rng.below(25) as f64 / 8.0,
                "grad_output" => rng.below(25) as f64 / 8.0 - 1.5,
                "lse" => rng.uniform(1.0, 6.0),
                // Nearly what a row of a few classes has; class 2 in the bits of f64.
                "merged" => match i % MEMBERS {
                    0 => rng.uniform(1.0, 6.0),
                    2 => 1.0,
                    5 => f64::from_bits(2),
                    _ => rng.normal(),
                },
                _ => rng.normal() * deviation,
            };
            let x = match special {
                Some(special) if i % 7 == 3 => special,
                _ if bad_target && is_target && i + 1 == count => {
                    // Finite in every float: docs/semantics.md promises nothing of infinite masses.
                    let far = if dtype.is_float() { [1e4, -1e3] } else { [1e9, -1e15] };
                    [classes as f64, -1.0, far[0], far[1]][rng.below(4)]
                }
                _ => x,
            };
            let bytes = encode(dtype, x);
            self.arena.regions[region].write(at, &bytes);
        }
    }
}

/// Whether the integers of a dtype include this one.
fn holds(dtype: Dtype, x: i64) -> bool {
    match dtype {
        // As far as f64 holds it, through which it goes.
        Dtype::I64 => x as f64 as i64 == x,
        Dtype::I32 => i32::try_from(x).is_ok(),
        Dtype::U32 => u32::try_from(x).is_ok(),
        Dtype::U16 => u16::try_from(x).is_ok(),
        _ => u8::try_from(x).is_ok(),
    }
}

/// The dtype of that code.
pub fn dtype_of(code: u32) -> Option<Dtype> {
    match code {
        0..4 => Some(FLOATS[code as usize]),
        16 => Some(Dtype::I64),
        17 => Some(Dtype::I32),
        18..21 => Some(INTEGERS[code as usize - 18]),
        _ => None,
    }
}

fn encode(dtype: Dtype, x: f64) -> Vec<u8> {
    match dtype {
        Dtype::F32 => (x as f32).to_ne_bytes().to_vec(),
        Dtype::F64 => x.to_ne_bytes().to_vec(),
        Dtype::Bf16 => bf16::from_f64(x).to_ne_bytes().to_vec(),
        Dtype::F16 => f16::from_f64(x).to_ne_bytes().to_vec(),
        Dtype::I64 => (x as i64).to_ne_bytes().to_vec(),
        Dtype::I32 => (x as i32).to_ne_bytes().to_vec(),
        Dtype::U32 => (x as u32).to_ne_bytes().to_vec(),
        Dtype::U16 => (x as u16).to_ne_bytes().to_vec(),
        Dtype::U8 => (x as u8).to_ne_bytes().to_vec(),
    }
}
