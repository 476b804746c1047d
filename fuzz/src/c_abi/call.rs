//! A call of the C interface: descriptors at their addresses.

use super::abi::{self, Linear, LinearGrads, MEMBERS, Problem, Results, Shape, View};
use super::model::{self, Axes, FLOATS, INDICES, LOSSES, Operand, Rules, Verdict};
use std::ffi::c_void;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    Forward,
    Backward,
    BackwardTargets,
    ForwardBackward,
    LogSoftmax,
    LogSoftmaxBackward,
    Softmax,
    SoftmaxBackward,
    LinearForward,
    LinearBackward,
    LinearForwardBackward,
    PartialForward,
    PartialFinish,
    PartialBackward,
    LinearPartialForward,
    LinearPartialBackward,
    PartialMerge,
}

impl Entry {
    /// The call is of a linear layer.
    pub fn is_linear(self) -> bool {
        use Entry::{
            LinearBackward, LinearForward, LinearForwardBackward, LinearPartialBackward,
            LinearPartialForward,
        };
        matches!(self, LinearForward | LinearBackward | LinearForwardBackward)
            || matches!(self, LinearPartialForward | LinearPartialBackward)
    }

    /// The call writes or reads states of shards.
    pub fn has_states(self) -> bool {
        use Entry::{
            LinearPartialBackward, LinearPartialForward, PartialBackward, PartialFinish,
            PartialForward,
        };
        matches!(self, PartialForward | PartialFinish | PartialBackward)
            || matches!(self, LinearPartialForward | LinearPartialBackward)
    }
}

pub const ENTRIES: [Entry; 17] = [
    Entry::ForwardBackward,
    Entry::Forward,
    Entry::Backward,
    Entry::BackwardTargets,
    Entry::LogSoftmax,
    Entry::LogSoftmaxBackward,
    Entry::Softmax,
    Entry::SoftmaxBackward,
    Entry::LinearForwardBackward,
    Entry::LinearForward,
    Entry::LinearBackward,
    Entry::PartialForward,
    Entry::PartialFinish,
    Entry::PartialBackward,
    Entry::LinearPartialForward,
    Entry::LinearPartialBackward,
    Entry::PartialMerge,
];

/// The way in which a struct is passed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Handed {
    Null,
    /// With a given struct_size. The bytes past the library's struct are zero, or not.
    Sized {
        size: u32,
        clean: bool,
    },
}

impl Handed {
    /// What is wrong with a struct of `own` bytes, of which the first release had `first`.
    fn fault(self, first: usize, own: usize) -> Option<i32> {
        match self {
            Handed::Null => Some(abi::NULL),
            Handed::Sized { size, .. } if (size as usize) < first => Some(abi::STRUCT),
            Handed::Sized { size, clean } if size as usize > own && !clean => Some(abi::STRUCT),
            Handed::Sized { .. } => None,
        }
    }
}

/// The arguments of any entry point; those that it lacks are ignored.
#[derive(Clone, Debug)]
pub struct Arguments {
    pub entry: Entry,
    /// The problem, or the shape.
    pub first: Handed,
    pub problem: Problem,
    pub results: Results,
    pub results_handed: Handed,
    pub linear: Linear,
    pub linear_handed: Handed,
    pub grads: LinearGrads,
    pub grads_handed: Handed,
    /// The place of a shard, and the states of its rows or of all shards.
    pub class_offset: usize,
    pub total_classes: usize,
    pub states: *mut c_void,
    /// The pointers to the results, or to the operands, are not NULL.
    pub grad_output: Option<View>,
    pub grad: Option<View>,
    pub lse: *mut c_void,
    pub grad_scale: f64,
    /// Operands of softmax and log-softmax.
    pub x: Option<View>,
    pub grad_y: Option<View>,
    pub y: Option<View>,
}

fn scalar(name: &'static str, data: *mut c_void, dtype: u32) -> Operand {
    packed(name, data, dtype, Axes::One)
}

/// An output that C knows by its type.
fn packed(name: &'static str, data: *mut c_void, dtype: u32, axes: Axes) -> Operand {
    let view = View { data, dtype, strides: [0; 3] };
    let allowed = if dtype == abi::F64 { &[abi::F64] } else { &[abi::I64] };
    let (required, output) = (false, true);
    Operand {
        name,
        view,
        axes,
        allowed,
        required,
        output,
        replaceable: false,
        replaces: false,
        fills_padding: false,
    }
}

impl Arguments {
    pub fn is_softmax(&self) -> bool {
        use Entry::{LogSoftmax, LogSoftmaxBackward, Softmax, SoftmaxBackward};
        matches!(self.entry, LogSoftmax | LogSoftmaxBackward | Softmax | SoftmaxBackward)
    }

    pub fn is_softmax_backward(&self) -> bool {
        matches!(self.entry, Entry::LogSoftmaxBackward | Entry::SoftmaxBackward)
    }

    pub fn is_linear(&self) -> bool {
        self.entry.is_linear()
    }

    /// The call is over the classes of a shard.
    pub fn is_shard(&self) -> bool {
        self.writes_states()
            || matches!(self.entry, Entry::PartialBackward | Entry::LinearPartialBackward)
    }

    pub fn writes_states(&self) -> bool {
        matches!(self.entry, Entry::PartialForward | Entry::LinearPartialForward)
    }

    pub fn has_states(&self) -> bool {
        self.entry.has_states()
    }

    /// Whether the entry point has results.
    pub fn has_results(&self) -> bool {
        self.has_optional_results()
            || matches!(self.entry, Entry::Forward | Entry::PartialFinish | Entry::LinearForward)
    }

    /// The pointer to the results may be NULL.
    fn has_optional_results(&self) -> bool {
        matches!(self.entry, Entry::ForwardBackward | Entry::LinearForwardBackward)
    }

    /// A gradient of logits, of targets, or of a layer.
    pub fn has_gradient(&self) -> bool {
        use Entry::{
            Backward, BackwardTargets, ForwardBackward, LinearBackward, LinearForwardBackward,
            LinearPartialBackward, PartialBackward,
        };
        matches!(self.entry, Backward | BackwardTargets | ForwardBackward | PartialBackward)
            || matches!(self.entry, LinearBackward | LinearForwardBackward | LinearPartialBackward)
    }

    /// An lse is an input.
    pub fn takes_lse(&self) -> bool {
        let of_logits = matches!(self.entry, Entry::Backward | Entry::BackwardTargets);
        self.entry == Entry::LinearBackward || of_logits && self.problem.flags & abi::LOG_PROBS == 0
    }

    /// The classes that target indices and class weights are of.
    pub fn all_classes(&self) -> usize {
        if self.has_states() { self.total_classes } else { self.problem.classes }
    }

    pub fn sizes(&self) -> model::Sizes {
        let Problem { rows, classes, inner, .. } = self.problem;
        // The other calls' operands of classes are those of a shard.
        let is_whole = self.entry == Entry::PartialFinish;
        [rows, if is_whole { self.total_classes } else { classes }, inner]
    }

    /// The targets are of listed classes.
    pub fn is_sparse(&self) -> bool {
        !self.problem.target_classes.data.is_null()
    }

    /// The call reads the lists of sparse targets.
    fn reads_lists(&self) -> bool {
        let has_targets = !self.problem.targets.data.is_null() || self.needs_targets();
        self.is_sparse() && has_targets && !self.leaves_targets_unread()
    }

    pub fn has_indices(&self) -> bool {
        !self.is_sparse() && !FLOATS.contains(&self.problem.targets.dtype)
    }

    /// The results that the call asks for; `None` if the entry point has none or they are NULL.
    pub fn wanted(&self) -> Option<&Results> {
        let there = self.has_results() && self.results_handed != Handed::Null;
        there.then_some(&self.results)
    }

    /// The operands of the call, inputs first.
    pub fn operands(&self) -> Vec<Operand> {
        let input = |name, view: View, axes, allowed, required| Operand {
            name,
            view,
            axes,
            allowed,
            required,
            output: false,
            replaceable: false,
            replaces: false,
            fills_padding: false,
        };
        let output = |name, view, axes, allowed| Operand {
            output: true,
            ..input(name, view, axes, allowed, false)
        };
        if self.is_softmax() {
            let x = input("x", self.x.unwrap_or(View::ABSENT), Axes::Full, FLOATS, true);
            let grad_y = Operand { name: "grad_y", view: self.grad_y.unwrap_or(View::ABSENT), ..x };
            let y = Operand {
                required: true,
                replaces: true,
                ..output("y", self.y.unwrap_or(View::ABSENT), Axes::Full, FLOATS)
            };
            let inputs = if self.is_softmax_backward() { vec![x, grad_y] } else { vec![x] };
            let inputs = inputs.into_iter().map(|x| Operand { replaceable: true, ..x });
            return inputs.chain([y]).collect();
        }
        let p = &self.problem;
        let by_row = p.reduction == 2;
        // Merged states need no more of probabilities than that they are there.
        let are_few = self.has_indices() || self.entry == Entry::PartialFinish;
        let target_axes = if are_few { Axes::Rows } else { Axes::Full };
        let replaceable = self.has_gradient()
            && self.entry != Entry::BackwardTargets
            && p.flags & abi::ACCUMULATE == 0;
        let mut all = Vec::new();
        let features = self.linear.features;
        let (of_rows, of_classes) = (Axes::RowFeatures(features), Axes::ClassFeatures(features));
        if self.is_linear() {
            all.push(input("hidden", self.linear.hidden, of_rows, FLOATS, true));
            all.push(input("weight", self.linear.weight, of_classes, FLOATS, true));
            all.push(input("bias", self.linear.bias, Axes::Classes, FLOATS, false));
        } else if self.entry != Entry::PartialFinish {
            let logits = input("logits", p.logits, Axes::Full, FLOATS, true);
            all.push(Operand { replaceable, ..logits });
        }
        if self.reads_lists() {
            let axes = Axes::PerRow(p.target_count);
            all.push(input("targets", p.targets, axes, FLOATS, true));
            all.push(input("target_classes", p.target_classes, axes, INDICES, true));
        } else if !self.leaves_targets_unread() && !self.is_sparse() {
            let dtypes = model::INDICES_OR_FLOATS;
            all.push(input("targets", p.targets, target_axes, dtypes, self.needs_targets()));
        }
        let weighted = match self.has_states() {
            true => Axes::Elements(self.total_classes),
            false => Axes::Classes,
        };
        all.extend([
            input("class_weights", p.class_weights, weighted, FLOATS, false),
            input("row_weights", p.row_weights, Axes::Rows, FLOATS, false),
            input("row_mask", p.row_mask, Axes::Rows, &[abi::U8], false),
        ]);
        if self.has_gradient() {
            let axes = if by_row { Axes::Rows } else { Axes::One };
            let upstream = self.grad_output.unwrap_or(View::ABSENT);
            all.push(input("grad_output", upstream, axes, FLOATS, false));
        }
        if self.has_gradient() && self.is_linear() {
            let grads = &self.grads;
            all.push(output("grads.hidden", grads.hidden, of_rows, FLOATS));
            all.push(output("grads.weight", grads.weight, of_classes, FLOATS));
            all.push(output("grads.bias", grads.bias, Axes::Classes, FLOATS));
        } else if self.has_gradient() {
            let grad = output("grad", self.grad.unwrap_or(View::ABSENT), Axes::Full, FLOATS);
            let fills_padding = self.zeroes_padding();
            all.push(Operand { required: true, replaces: true, fills_padding, ..grad });
        }
        if self.takes_lse() {
            let lse = packed("lse", self.lse, abi::F64, Axes::Rows);
            all.push(Operand { output: false, required: true, ..lse });
        }
        if self.has_states() {
            let count = p.rows.saturating_mul(p.inner).saturating_mul(MEMBERS);
            let name = if self.writes_states() { "partials" } else { "merged" };
            let states = packed(name, self.states, abi::F64, Axes::Elements(count));
            all.push(Operand { output: self.writes_states(), required: true, ..states });
        }
        if let Some(r) = self.wanted() {
            // A count above the classes is refused.
            let top = Axes::PerRow(r.top_count.min(self.sizes()[1]));
            all.extend([
                packed("lse", r.lse, abi::F64, Axes::Rows),
                scalar("loss", r.loss, abi::F64),
                output("row_losses", r.row_losses, Axes::Rows, LOSSES),
                scalar("z_loss", r.z_loss, abi::F64),
                scalar("normalizer", r.normalizer, abi::F64),
                scalar("z_normalizer", r.z_normalizer, abi::F64),
                scalar("kept_rows", r.kept_rows, abi::I64),
                packed("argmax", r.argmax, abi::I64, Axes::Rows),
                scalar("correct", r.correct, abi::I64),
                output("entropy", r.entropy, Axes::Rows, LOSSES),
                output("kl", r.kl, Axes::Rows, LOSSES),
                scalar("entropy_bonus", r.entropy_bonus, abi::F64),
                packed("top_classes", r.top_classes, abi::I64, top),
                output("top_log_probs", r.top_log_probs, top, LOSSES),
                packed("target_ranks", r.target_ranks, abi::I64, Axes::Rows),
            ]);
        }
        all
    }

    /// Probabilities of merged states; those of a shard without classes may be absent.
    pub fn leaves_targets_unread(&self) -> bool {
        let p = &self.problem;
        self.entry == Entry::PartialFinish
            && !self.has_indices()
            && (self.is_sparse() || !p.targets.data.is_null() || p.classes == 0)
    }

    fn needs_targets(&self) -> bool {
        let asks = |r: &Results| {
            let denominators = [r.normalizer, r.z_normalizer, r.kept_rows];
            let losses = [r.loss, r.z_loss, r.entropy_bonus, r.correct];
            let mut scalars = losses.into_iter().chain(denominators);
            let of_rows = [r.row_losses.data, r.kl.data, r.target_ranks];
            of_rows.iter().any(|to| !to.is_null()) || scalars.any(|to| !to.is_null())
        };
        self.has_gradient() || self.wanted().is_some_and(asks)
    }

    /// The call clears the padding of its gradient.
    fn zeroes_padding(&self) -> bool {
        self.problem.flags & abi::ZERO_PADDING != 0
            && matches!(
                self.entry,
                Entry::Backward | Entry::ForwardBackward | Entry::PartialBackward
            )
    }

    /// The fault of the linear layer's structs, those of contents before NULL.
    fn fault_of_layer(&self) -> Option<i32> {
        let mut faults = Vec::new();
        if self.is_linear() {
            faults.push(self.linear_handed.fault(size_of::<Linear>(), size_of::<Linear>()));
            if self.linear_handed != Handed::Null && self.linear.flags > 7 {
                faults.push(Some(abi::STRUCT));
            }
        }
        if self.is_linear() && self.has_gradient() {
            faults
                .push(self.grads_handed.fault(size_of::<LinearGrads>(), size_of::<LinearGrads>()));
        }
        let faults: Vec<i32> = faults.into_iter().flatten().collect();
        let has_struct = faults.contains(&abi::STRUCT);
        if has_struct { Some(abi::STRUCT) } else { faults.first().copied() }
    }

    /// Sizes that layers and shards refuse.
    fn has_bad_shape(&self) -> bool {
        let Problem { rows, classes, inner, logits, .. } = self.problem;
        let most = (isize::MAX as u128) / 16;
        let product = |a: usize, b: usize| a as u128 * b as u128;
        let mut bad = false;
        if self.reads_lists() {
            let places = product(rows, self.problem.target_count);
            bad |= places.checked_mul(inner as u128).is_none_or(|n| n > most);
        }
        if self.is_linear() {
            let features = self.linear.features;
            bad |= !logits.data.is_null() || inner != 1 || (features == 0 && rows > 0);
            bad |= product(rows, features) > most || product(classes, features) > most;
        }
        if self.has_states() {
            let (count, total) = (product(rows, inner), self.total_classes);
            let is_shard = self.is_shard();
            let end = if is_shard { self.class_offset as u128 + classes as u128 } else { 0 };
            // f64 holds no class index beyond.
            bad |= end > total as u128 || total > 1 << 53 || (total == 0 && count > 0);
            bad |= count.checked_mul((8 * MEMBERS).max(total) as u128).is_none_or(|n| n > most);
        }
        bad
    }

    /// The outcomes that the header allows. They leave open whether targets are in range.
    pub fn verdict(&self) -> Verdict {
        let just = |code: i32| Verdict { codes: vec![code] };
        let (first, own) = match self.is_softmax() {
            true => (size_of::<Shape>(), size_of::<Shape>()),
            false => (abi::FIRST_PROBLEM, size_of::<Problem>()),
        };
        if let Some(fault) = self.first.fault(first, own) {
            return just(fault);
        }
        let known = if self.is_softmax() { 0 } else { 15 };
        if self.problem.flags & !known != 0 {
            return just(abi::STRUCT);
        }
        let mut faults = vec![self.fault_of_layer()];
        if self.has_results() {
            let own = size_of::<Results>();
            let fault = self.results_handed.fault(abi::FIRST_RESULTS, own);
            let may_be_null = fault == Some(abi::NULL) && self.has_optional_results();
            faults.push(fault.filter(|_| !may_be_null));
        }
        if faults.contains(&Some(abi::STRUCT)) {
            return just(abi::STRUCT);
        }
        let missing = if self.is_softmax() {
            self.x.is_none()
                || self.y.is_none()
                || self.is_softmax_backward() && self.grad_y.is_none()
        } else {
            self.has_gradient() && !self.is_linear() && self.grad.is_none()
        };
        if missing || faults.contains(&Some(abi::NULL)) {
            return just(abi::NULL);
        }
        let operands = self.operands();
        let rules = Rules {
            dtypes_agree: self.dtypes_agree(),
            bad_shape: self.has_bad_shape(),
            odd_shape: self.has_odd_shape(),
            allows_no_classes: self.has_states(),
        };
        let also = match model::operands(&operands, self.sizes(), rules) {
            Ok(also) => also,
            Err(verdict) => return verdict,
        };
        let code = if !self.is_softmax() && self.has_bad_option() { abi::PARAM } else { abi::OK };
        let mut codes = vec![code];
        codes.extend(also);
        // How little is too little the header does not say.
        if self.is_linear() && (1..1 << 25).contains(&self.linear.workspace) {
            codes.push(abi::PARAM);
        }
        Verdict { codes }
    }

    /// Lists of no positions; whether their rows and places overflow is a matter of order.
    fn has_odd_shape(&self) -> bool {
        let Problem { rows, inner, target_count, .. } = self.problem;
        let places = rows as u128 * target_count as u128;
        self.reads_lists() && places > usize::MAX as u128 && inner == 0
    }

    fn dtypes_agree(&self) -> bool {
        let dtype = |view: Option<View>| view.unwrap_or(View::ABSENT).dtype;
        if self.is_softmax() {
            let x = dtype(self.x);
            return dtype(self.y) == x && (!self.is_softmax_backward() || dtype(self.grad_y) == x);
        }
        if self.is_linear() {
            let hidden = self.linear.hidden.dtype;
            let fits = |grad: &View| grad.data.is_null() || grad.dtype == hidden || grad.dtype == 0;
            let grads =
                !self.has_gradient() || (fits(&self.grads.hidden) && fits(&self.grads.weight));
            return self.linear.weight.dtype == hidden && grads;
        }
        if !self.has_gradient() || self.entry == Entry::BackwardTargets {
            return true;
        }
        let (logits, grad) = (self.problem.logits.dtype, dtype(self.grad));
        grad == logits || (matches!(logits, 2 | 3) && grad == 0)
    }

    fn has_bad_option(&self) -> bool {
        let p = &self.problem;
        let finite = |x: f64| x.is_finite() && x >= 0.0;
        let ranges = (0.0..=1.0).contains(&p.label_smoothing)
            && [p.z_loss, p.softcap, p.normalizer, p.z_normalizer].into_iter().all(finite)
            && p.logit_scale.is_finite()
            && p.entropy_bonus.is_finite()
            && p.logit_scale > 0.0
            && (!self.has_gradient() || self.grad_scale.is_finite());
        if !ranges || p.reduction > 2 {
            return true;
        }
        let has_rows = p.rows > 0 && p.inner > 0;
        let aims_at_indices = self.has_indices() && !p.targets.data.is_null();
        if self.entry == Entry::BackwardTargets && aims_at_indices {
            return true;
        }
        let sizes = self.sizes();
        let (count, scale) = (p.target_count, p.target_scale);
        let bad_count = if self.is_sparse() { count == 0 } else { count > 0 && has_rows };
        if bad_count || !finite(scale) || (scale > 0.0 && aims_at_indices) {
            return true;
        }
        if self.entry == Entry::BackwardTargets && (self.is_sparse() || scale > 0.0) {
            return true;
        }
        if self.has_states() && scale > 0.0 && !self.is_sparse() {
            return true;
        }
        let is_contiguous = |grad: &Operand| p.classes <= 1 || grad.steps(sizes)[1] == 1;
        if self.zeroes_padding()
            && has_rows
            && !(p.inner == 1
                && self.operands().iter().all(|o| !o.fills_padding || is_contiguous(o)))
            && self.grad.is_some_and(|grad| !grad.data.is_null())
        {
            return true;
        }
        let log_probs = p.flags & abi::LOG_PROBS != 0;
        let of_stored = abi::LOG_PROBS | abi::ACCUMULATE | abi::ZERO_PADDING;
        if (self.has_states() && log_probs) || (self.is_linear() && p.flags & of_stored != 0) {
            return true;
        }
        let changes = p.softcap != 0.0 || p.logit_scale != 1.0;
        if log_probs && (p.z_loss != 0.0 || p.entropy_bonus != 0.0 || changes) {
            return true;
        }
        self.wanted().is_some_and(|r| {
            let parts = !r.z_loss.is_null() || !r.entropy_bonus.is_null();
            let reduced = !r.loss.is_null() || parts;
            let of_softmax = !r.lse.is_null() || parts || !r.entropy.data.is_null();
            let lists = !r.top_classes.is_null() || !r.top_log_probs.data.is_null();
            (p.reduction == 2 && reduced)
                || (log_probs && of_softmax)
                || (!r.correct.is_null() && !aims_at_indices && has_rows)
                || (!r.kl.data.is_null() && aims_at_indices && has_rows)
                || (!r.kl.data.is_null() && self.has_states())
                || (!r.target_ranks.is_null() && !aims_at_indices && has_rows)
                || (lists && !(1..=64).contains(&r.top_count))
                || (lists && r.top_count > p.classes && has_rows)
                || (self.entry == Entry::PartialFinish && (lists || !r.target_ranks.is_null()))
        })
    }

    /// A class index in memory, of a kept row, that is out of range.
    pub fn has_bad_target(&self, read: impl Fn(&Operand, usize) -> i64) -> bool {
        let operands = self.operands();
        let find = |name: &str| operands.iter().find(|o| o.name == name && o.is_present());
        let is_list = find("target_classes").is_some();
        let classes = find("target_classes").or_else(|| find("targets"));
        let Some(targets) = classes.filter(|t| INDICES.contains(&t.view.dtype)) else {
            return false;
        };
        let sizes = self.sizes();
        let mask = find("row_mask");
        let masks = mask.map(|mask| mask.places(sizes));
        targets.places(sizes).into_iter().enumerate().any(|(i, at)| {
            let [_, places, inner] = targets.sizes(sizes);
            let i = if is_list { i / (places * inner) * inner + i % inner } else { i };
            let kept =
                mask.zip(masks.as_ref()).is_none_or(|(mask, places)| read(mask, places[i]) != 0);
            let y = read(targets, at);
            kept && y != self.problem.ignore_index
                && usize::try_from(y).map_or(true, |y| y >= self.all_classes())
        })
    }
}
