//! What strips and short rows have in common: operands in, results out, around the arithmetic of ordinary rows
//! ([`crate::kernels::ordinary`]). A distribution is a lane of the state either way.

use super::call::Call;
use super::masses;
use super::place::Place;
use super::strided::{self, AGAIN};
use crate::kernels::ordinary::{
    self as lanes, FACTORS, LaneScratch, NarrowScratch, OrdinaryState, SMOOTHED, Smoothing, WORDS,
    Wanted,
};
use crate::kernels::row_math::RowInputs;
use crate::kernels::scratch::Scratch;
use crate::plan::{Loss, Targets};
use crate::strategy::{LARGEST_WEIGHT, TILE, WEIGHED_CLASSES};
use crate::view::{FloatType, Span, View};

/// What a call wants of its rows.
#[inline(always)]
pub fn wanted(call: &Call, loss: &Loss) -> Wanted {
    let gradient = loss.gradient.as_ref();
    let smoothing = loss.spreads_smoothing().then_some(Smoothing {
        keep: 1.0 - loss.label_smoothing,
        share: loss.smoothing_share,
        total: loss.weight_total,
    });
    let by_row = loss.row_weights.is_some() || call.has_masses || smoothing.is_some();
    Wanted {
        has_weights: by_row,
        has_grad_output: by_row || gradient.is_some_and(|of| of.grad_output.is_some()),
        lse: loss.wants_lse(),
        gradient: gradient.map(|gradient| gradient.scale),
        smoothing,
    }
}

/// Distributions that go through the sweeps together at most.
pub fn most(loss: &Loss, dtype: FloatType) -> usize {
    let most = lanes::most(dtype.lane_size());
    if loss.spreads_smoothing() { most.min(SMOOTHED) } else { most }
}

/// The number of a lane, in the lanes' own type.
///
/// # Safety
/// It is set, in the type of the call's lanes, and the array has room for it.
#[inline(always)]
pub unsafe fn number(call: &Call, of: &mut NarrowScratch, lane: usize) -> f64 {
    // SAFETY: this function's own # Safety.
    unsafe {
        match call.plan.logits.dtype.has_f32_lanes() {
            true => f64::from(*lanes::lanes::<f32, _>(of, lane)),
            false => *lanes::lanes::<f64, _>(of, lane),
        }
    }
}

/// Room for the weights of some classes.
pub type WeightScratch = Scratch<WEIGHED_CLASSES>;

/// The weights of some classes, for label smoothing.
pub struct Weights<'a> {
    /// Lent: the compiler fills what is part of a struct.
    buffer: &'a mut WeightScratch,
    /// Those that were read are usual ones.
    pub are_usual: bool,
}

impl<'a> Weights<'a> {
    /// None were read.
    #[inline(always)]
    pub fn new(buffer: &'a mut WeightScratch) -> Self {
        Weights { buffer, are_usual: true }
    }

    /// Reads those of `len` classes, WEIGHED_CLASSES at most, from `class` on. Null if all weigh 1.
    ///
    /// # Safety
    /// The classes are the call's.
    pub unsafe fn read(&mut self, call: &Call, class: usize, len: usize) -> *const f64 {
        assert!(len <= WEIGHED_CLASSES);
        // SAFETY: there is room for WEIGHED_CLASSES, as just asserted. f64 of any bits may be in it, and those that are
        // read below are written first.
        let to = unsafe { std::slice::from_raw_parts_mut(self.buffer.start().cast(), len) };
        // SAFETY: the classes are the call's (# Safety).
        if !unsafe { masses::read_class_weights(call, class, to) } {
            return std::ptr::null();
        }
        self.are_usual &= to.iter().fold(true, |usual, w| usual & (w.abs() < LARGEST_WEIGHT));
        to.as_ptr()
    }
}

/// Reads the targets and what options say about the distributions of a span, at most [`most`].
///
/// # Safety
/// The span is the call's, a loss over class indices, and no longer than [`most`].
#[inline(always)]
pub unsafe fn read_operands(
    call: &Call,
    loss: &Loss,
    state: &mut OrdinaryState,
    span: &Span,
    wanted: &Wanted,
) {
    let Targets::Indices(targets) = &loss.targets else {
        unreachable!("ordinary rows have class indices");
    };
    let padded = lanes::padded(span.len);
    // SAFETY: an array has room for the most lanes (`OrdinaryState`), of which `padded` are at most all (# Safety). f64 of
    // any bits may be in it, and those that are read below are written first.
    let [excluded, weight, grad_output] = unsafe {
        [&mut state.excluded_sum_loss, &mut state.weight_then_lse, &mut state.grad_output]
            .map(|of| std::slice::from_raw_parts_mut(of.start().cast::<f64>(), padded))
    };
    excluded[span.len..].fill(RowInputs::IGNORED);
    // SAFETY: the targets cover the distributions (validation), and the slice has an element for each of them. The
    // processor has the set of the kernels (`Call::k`).
    unsafe { (call.k.lanes.read_classes)(targets, span, loss.ignore_index, excluded) };
    if let Some(mask) = &loss.row_mask {
        for (i, excluded) in excluded[..span.len].iter_mut().enumerate() {
            // SAFETY: the mask covers all rows of the plan (validation), the span's among them (# Safety).
            if unsafe { mask.integer(span.at(i)) } == 0 {
                *excluded = RowInputs::IGNORED;
            }
        }
    }
    if !wanted.has_weights && !wanted.has_grad_output {
        return;
    }
    weight.fill(1.0);
    grad_output.fill(1.0);
    // Smoothing has the weight of the excluded class apart from that of the row.
    let own = match wanted.smoothing {
        // SAFETY: smoothed distributions are no more than SMOOTHED, by `most`, which the span keeps to (# Safety); the
        // array has as many lanes again (`OrdinaryState`).
        Some(_) => unsafe {
            let start = lanes::lanes::<f64, _>(&mut state.weight_then_lse, SMOOTHED);
            std::slice::from_raw_parts_mut(start, padded)
        },
        None => &mut [],
    };
    own.fill(1.0);
    let given = loss.gradient.as_ref().and_then(|of| of.grad_output.as_ref());
    for i in 0..span.len {
        let at = span.at(i);
        // SAFETY: row weights and grad_output cover all rows of the plan (validation), the span's among them
        // (# Safety). Class weights cover all its classes (validation), and validation found the targets of rows
        // that count among these.
        unsafe {
            if excluded[i] >= 0.0 {
                let of_class = loss.class_weight(excluded[i] as usize);
                weight[i] = match own.get_mut(i) {
                    Some(own) => {
                        *own = of_class;
                        loss.row_weight(at)
                    }
                    None => loss.row_weight(at) * of_class,
                };
            }
            grad_output[i] = weight[i] * given.map_or(1.0, |view| view.real(at, 0));
        }
    }
}

/// Has all gradients computed in the general way if the factor that they share is not a usual one, or if the weights of
/// classes are not.
#[inline(always)]
pub fn check_scale(loss: &Loss, weights_are_usual: bool, state: &mut OrdinaryState) {
    let usual = |x: f64| x == 0.0 || FACTORS.contains(&x.abs());
    let scale_is_usual = loss.gradient.as_ref().is_none_or(|gradient| usual(gradient.scale));
    if !(scale_is_usual && weights_are_usual) {
        state.good_gradient = [0; WORDS];
    }
}

/// Computes the distributions of a place again that are not ordinary, as tiles; with `others` all of them, and writes
/// what the arithmetic of ordinary rows does not find out: argmax, entropy, and the order of the logits. Returns how
/// many of these have their largest logit at the target.
///
/// # Safety
/// The place is the call's, at most [`most`] long, and no other thread accesses it; the arithmetic of the rows has set its
/// lanes. No gradient of it was written. There are AGAIN_BYTES of `room`.
#[inline(always)]
pub unsafe fn again(
    call: &Call,
    loss: &Loss,
    state: &mut OrdinaryState,
    place: Place,
    others: bool,
    room: *mut u8,
) -> u64 {
    let mut correct = 0;
    for word in 0..place.len.div_ceil(TILE) {
        let lanes = !0 >> (TILE - (place.len - word * TILE).min(TILE));
        let counts = if loss.wants_lse() { lanes } else { lanes & state.kept[word] };
        let losses = counts & !state.good[word];
        let gradients = match call.plan.output {
            Some(_) => lanes & state.kept[word] & !state.good_gradient[word],
            None => 0,
        };
        if losses | gradients != 0 || others {
            let word = Word { index: word, losses, gradients, others };
            // SAFETY: the place has lanes in the word, by the range of the loop; the rest is this function's own
            // # Safety.
            correct += unsafe { word_again(call, loss, state, place, &word, room) };
        }
    }
    correct
}

/// 64 lanes, of which some are computed again.
struct Word {
    index: usize,
    /// Those whose losses are not good.
    losses: u64,
    /// Those whose gradients are not.
    gradients: u64,
    /// See [`again`].
    others: bool,
}

/// # Safety
/// As [`again`]; the place has lanes in the word.
#[cold]
#[inline(never)]
unsafe fn word_again(
    call: &Call,
    loss_of: &Loss,
    state: &mut OrdinaryState,
    place: Place,
    word: &Word,
    room: *mut u8,
) -> u64 {
    let mut correct = 0;
    let most = strided::again_len(call.plan.logits.dtype);
    for start in (word.index * TILE..place.len.min((word.index + 1) * TILE)).step_by(most) {
        let bits = |of: u64| of >> (start % TILE) & ((1 << most) - 1);
        let (losses, gradients) = (bits(word.losses), bits(word.gradients));
        #[cfg(test)]
        tests::count((losses | gradients).count_ones());
        if losses | gradients == 0 && !word.others {
            continue;
        }
        let place = place.part(start, most);
        let span = place.span(0, place.len);
        // SAFETY: the arrays have room for the most lanes (`OrdinaryState`), and the place has no more, which the
        // arithmetic of the rows has set (# Safety); what nobody wanted may have any bits, of f64.
        let [loss, lse] = unsafe {
            let of = [&mut state.excluded_sum_loss, &mut state.weight_then_lse];
            of.map(|of| {
                std::slice::from_raw_parts_mut(lanes::lanes::<f64, _>(of, start), place.len)
            })
        };
        let (entropy, argmax) = ([0.0; AGAIN], [0; AGAIN]);
        let mut again = strided::Again { loss, lse, entropy, argmax };
        // SAFETY: the distributions are the call's, no more than `most` by `part`, and this thread's (# Safety). The
        // results cover them (validation). There is room (# Safety).
        unsafe {
            strided::again(call, place, losses, gradients, room, &mut again);
            if !word.others {
                continue;
            }
            if let Some(view) = &loss_of.argmax {
                view.write_span(&span, &again.argmax);
            }
            if let Some(view) = &loss_of.entropy {
                view.write_span(&span, &again.entropy);
            }
        }
        if loss_of.counts_correct {
            for (i, &largest) in again.argmax[..place.len].iter().enumerate() {
                // SAFETY: the sums, before the arithmetic of the rows (# Safety), have set the classes of the place, which
                // `part` keeps within the lanes of the state.
                let class = unsafe { number(call, &mut state.class, start + i) };
                correct += u64::from(class == largest as f64);
            }
        }
    }
    correct
}

/// The losses of the first `len` lanes, or their lse.
///
/// # Safety
/// They are set, and at most [`most`].
#[inline(always)]
pub unsafe fn values(of: &mut LaneScratch, len: usize) -> &mut [f64] {
    // SAFETY: the array has room for the most lanes (`OrdinaryState`), of which these are set (# Safety).
    unsafe { std::slice::from_raw_parts_mut(of.start().cast::<f64>(), len) }
}

/// Writes the losses and lse of a span, if they are results.
///
/// # Safety
/// The span is the call's, whose losses are complete, as are its lse if they are wanted; no other thread writes them.
#[inline(always)]
pub unsafe fn write_results(loss: &Loss, state: &mut OrdinaryState, span: &Span) {
    let OrdinaryState { excluded_sum_loss, weight_then_lse, .. } = state;
    let write = |view: &Option<View<FloatType>>, of: &mut LaneScratch| {
        if let Some(view) = view {
            // SAFETY: the values are set, the lse if it is a result; the result covers the span (validation), and this
            // thread alone accesses it (# Safety).
            unsafe { view.write_span(span, values(of, span.len)) };
        }
    };
    write(&loss.row_losses, excluded_sum_loss);
    write(&loss.lse, weight_then_lse);
}

/// Bit i: the gradient of lane i is still to be written, of the first `len` lanes.
///
/// # Safety
/// The arithmetic of the rows has set the lanes; those that are not ordinary have been written.
#[inline(always)]
pub unsafe fn unwritten(
    call: &Call,
    state: &mut OrdinaryState,
    len: usize,
    is_smoothed: bool,
) -> [u64; WORDS] {
    let mut writes = [0; WORDS];
    for (i, writes) in writes.iter_mut().enumerate() {
        *writes = !state.kept[i] | state.good_gradient[i];
    }
    if call.plan.output.is_some_and(|output| output.accumulate) {
        for lane in 0..len {
            // SAFETY: the arithmetic of the rows has set the coefficients of the lane (# Safety), in arrays with room for
            // the most lanes (`OrdinaryState`).
            let [factor, entry] =
                unsafe { [&mut state.factor, &mut state.entry].map(|of| number(call, of, lane)) };
            let bias = match is_smoothed {
                // SAFETY: set with the other coefficients; smoothed distributions are no more than SMOOTHED, by `most`.
                true => unsafe { number(call, &mut state.entry, SMOOTHED + lane) },
                false => 0.0,
            };
            // Where nothing is added, an accumulated gradient stays as it is.
            if factor == 0.0 && entry == 0.0 && bias == 0.0 {
                writes[lane / TILE] &= !(1 << (lane % TILE));
            }
        }
    }
    writes
}

#[cfg(test)]
mod tests {
    use crate::simd::on_isa::available;
    use crate::{CrossEntropy, Input, Reduction, Results};
    use half::{bf16, f16};
    use std::cell::Cell;

    thread_local! {
        /// Distributions that this thread has computed again.
        static AGAIN: Cell<u32> = const { Cell::new(0) };
    }

    /// Counts distributions that are computed again.
    pub fn count(distributions: u32) {
        AGAIN.set(AGAIN.get() + distributions);
    }

    /// Logits of classes of `pitch` distributions each, within 4 of 0.
    fn logits(classes: usize, pitch: usize) -> Vec<f32> {
        let part = |i: usize| (i as f64 * 0.754_877_666).fract() as f32;
        (0..classes * pitch).map(|i| 8.0 * part(i) - 4.0).collect()
    }

    /// Distributions of usual logits are ordinary, in any number of lanes. One that is computed again has the same bits, and
    /// takes many times as long.
    #[test]
    fn usual_logits_are_not_computed_again() {
        let shapes = [2, 3, 4, 5, 10, 21, 79, 80, 100, 127, 129, 300, 1000]
            .into_iter()
            .flat_map(|classes| [1, 3, 8, 17, 63, 65, 130, 300].map(|lanes| (classes, lanes)));
        for (classes, lanes) in shapes {
            let y: Vec<i64> = (0..lanes).map(|lane| (lane * 7 % classes) as i64).collect();
            for isa in available() {
                for inner in [1, lanes] {
                    let call = CrossEntropy::new(lanes / inner, classes).inner(inner);
                    let call = call.threads(1).isa(isa).reduction(Reduction::Sum);
                    let x = &logits(classes, lanes);
                    macro_rules! run {
                        ($x:expr, $zero:expr) => {{
                            let (x, mut grad) = ($x, vec![$zero; classes * lanes]);
                            let mut lse = vec![0.0; lanes];
                            let results = Results { lse: Some(&mut lse), ..Results::default() };
                            call.forward_backward_with(Input::from(&x), &y, &mut grad, results)
                                .unwrap();
                            call.forward(Input::from(&x), &y).unwrap();
                        }};
                    }
                    run!(x.clone(), 0f32);
                    run!(x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), 0f64);
                    run!(x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>(), bf16::ZERO);
                    run!(x.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>(), f16::ZERO);
                    assert_eq!(AGAIN.get(), 0, "{lanes} of {classes}, {inner}, {}", isa.name());
                }
            }
        }
        // Where the first classes say nothing of the others, they are.
        let mut x = logits(10, 64);
        x[5 * 64..].iter_mut().for_each(|x| *x += 500.0);
        let call = CrossEntropy::new(1, 10).inner(64).threads(1);
        call.forward(&x, &[0i64; 64]).unwrap();
        assert_eq!(AGAIN.get(), 64);
    }
}
