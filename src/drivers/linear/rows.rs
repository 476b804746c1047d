//! The rows of a block: from their operands over the sums to results and to the records of their gradients.

use super::job::{Job, RowRecord, Tile};
use super::memory::Worker;
use crate::drivers::batch::{InitialShift, Reduction, bonus, from_initial, set_sums};
use crate::drivers::call::Excluded;
use crate::drivers::masses::{self, Divergence};
use crate::drivers::operands;
use crate::drivers::ranking::{self, RowRanking};
use crate::drivers::segment::{self, PlacedRow};
use crate::drivers::shards;
use crate::drivers::totals::Totals;
use crate::kernels::contiguous::gradient::ExpScale;
use crate::kernels::ranking::{Entry, Ranking};
use crate::kernels::row_math::{ROWS, RowGroup, RowGroupExtras};
use crate::kernels::row_state::{ArgMax, ExpSum, RowState};
use crate::math::compensated::CompensatedSum;
use crate::math::exp2::Shift;
use crate::math::scalar::exp2;
use crate::strategy::{CONVERTED, VOCABULARY_BLOCK};
use crate::view::{Axis, Position, Span};
use std::ops::Range;

/// A row as a span.
#[inline(always)]
fn span(row: usize) -> Span {
    Span { first: Position { row, inner: 0 }, axis: Axis::Rows, len: 1 }
}

impl Job<'_> {
    /// Reads the lse of rows, and adds up the masses of probability targets, unless a first sweep does: all that a
    /// gradient from an lse needs of one, but for an entropy bonus.
    ///
    /// # Safety
    /// As [`rows`](Self::rows); the operands are read.
    pub unsafe fn read_lse(&self, worker: &mut Worker, rows: &[usize]) {
        for (i, &row) in rows.iter().enumerate() {
            let group = &mut worker.groups[i / ROWS];
            // SAFETY: the row is the plan's and this thread's (# Safety).
            unsafe {
                operands::read_lse(&self.call, &span(row), i % ROWS, group);
                if self.call.spreads_mass && !self.call.sums_exps {
                    worker.states[i].mass = self.mass(row);
                }
                if let Some(shard) = self.call.mass_of_shard {
                    let mass = &mut worker.extras[i / ROWS].weighted.mass;
                    shards::read_masses(shard, &span(row), i % ROWS, mass);
                }
            }
        }
    }

    /// Reads the operands of rows, and the logits of their targets: from a tile that has all of their logits, if there
    /// is one.
    ///
    /// # Safety
    /// As [`rows`](Self::rows).
    pub unsafe fn start(&self, worker: &mut Worker, rows: &[usize], made: Option<&Tile>) {
        let call = &self.call;
        let groups = rows.len().div_ceil(ROWS);
        worker.groups.clear();
        worker.groups.resize(groups, RowGroup::EMPTY);
        worker.extras.clear();
        worker.extras.resize(groups, RowGroupExtras::NONE);
        worker.states.clear();
        worker.states.resize(rows.len(), RowState::EMPTY);
        worker.reductions.clear();
        worker.reductions.resize(rows.len(), None);
        worker.shifts.clear();
        worker.shifts.resize(rows.len(), Shift::ZERO);
        worker.divergences.clear();
        if self.loss.kl.is_some() {
            worker.divergences.resize(rows.len(), Divergence::ZERO);
        }
        worker.largest.clear();
        worker.largest.resize(rows.len(), ArgMax { class: 0, ..ArgMax::NONE });
        for (i, &row) in rows.iter().enumerate() {
            let (inputs, factors) =
                (&mut worker.groups[i / ROWS].inputs, &mut worker.extras[i / ROWS].factors);
            // A largest logit is not known yet; it is read again in `finish`.
            let largest = &worker.largest[i..=i];
            // SAFETY: the row is the plan's and this thread's (# Safety).
            unsafe {
                masses::read_teacher(call, &span(row));
                operands::read(call, &span(row), i % ROWS, inputs, Some(factors), largest);
            }
        }
        if call.excluded == Excluded::Target {
            match made {
                Some(tile) => {
                    for i in 0..rows.len() {
                        let inputs = &mut worker.groups[i / ROWS].inputs;
                        if let Some(class) = inputs.class(i % ROWS) {
                            // SAFETY: the tile has all classes of the row (# Safety), this one among them.
                            inputs.x_y[i % ROWS] = unsafe { self.lane_at(tile.row(i), class) };
                        }
                    }
                }
                // SAFETY: the rows are the plan's and this thread's (# Safety).
                None => unsafe { self.target_logits(worker, rows) },
            }
        }
        self.start_rankings(worker, rows.len());
        if call.excluded == Excluded::Target {
            self.transform_excluded(worker, rows.len());
        }
    }

    /// Begins with the order of the logits of rows, whose targets' logits are as the product has made them.
    fn start_rankings(&self, worker: &mut Worker, rows: usize) {
        let Some(rankings) = self.call.rankings else { return };
        worker.entries.clear();
        worker.entries.resize(rows * rankings.top_count, Entry::NONE);
        worker.rankings.clear();
        let groups = &worker.groups;
        worker.rankings.extend((0..rows).map(|i| {
            let inputs = &groups[i / ROWS].inputs;
            let class = inputs.class(i % ROWS).filter(|_| ranking::wants_ranks(&self.call));
            Ranking::new(class.map(|class| Entry { value: inputs.x_y[i % ROWS], class }))
        }));
    }

    /// Scales and caps the logits of the excluded classes.
    fn transform_excluded(&self, worker: &mut Worker, rows: usize) {
        for (i, group) in worker.groups.iter_mut().enumerate() {
            let factors = &mut worker.extras[i].factors;
            let rows = 0..ROWS.min(rows - i * ROWS);
            operands::transform_excluded(&self.call, &mut group.inputs, factors, rows);
        }
    }

    /// Computes the logits of the targets, to the bits that the blocks have: a small block for a few rows has them
    /// on its diagonal.
    ///
    /// # Safety
    /// As [`rows`](Self::rows); the operands are read.
    unsafe fn target_logits(&self, worker: &mut Worker, rows: &[usize]) {
        let tile = self.tile(worker, 0);
        for (start, rows) in
            rows.chunks(self.k.panel).enumerate().map(|(i, rows)| (i * self.k.panel, rows))
        {
            let mut targets = [0; VOCABULARY_BLOCK];
            let mut any = false;
            for (i, target) in targets[..rows.len()].iter_mut().enumerate() {
                let at = start + i;
                if let Some(class) = worker.groups[at / ROWS].inputs.class(at % ROWS) {
                    (*target, any) = (class, true);
                }
            }
            if !any {
                continue;
            }
            // SAFETY: the rows are the plan's (# Safety); so are the classes, targets in range (validation) or 0.
            unsafe {
                self.logits(worker, &tile, 0, rows.iter().copied(), rows.len(), |i| targets[i])
            };
            for i in 0..rows.len() {
                let inputs = &mut worker.groups[(start + i) / ROWS].inputs;
                if inputs.class((start + i) % ROWS).is_some() {
                    // SAFETY: `logits` above has made as many classes as there are rows, this one on the diagonal.
                    inputs.x_y[(start + i) % ROWS] = unsafe { self.lane_at(tile.row(i), i) };
                }
            }
        }
    }

    /// Adds a block of logits, in a tile, to the state of row `i` of the row block.
    ///
    /// # Safety
    /// The tile holds these classes of the row, which is the plan's; no other thread accesses them.
    pub unsafe fn reduce(
        &self,
        worker: &mut Worker,
        tile: &Tile,
        i: usize,
        row: usize,
        classes: Range<usize>,
    ) {
        let call = &self.call;
        let place = self.placed(tile, i, row);
        if classes.start == 0 {
            // SAFETY: the tile holds the row's first classes (# Safety).
            worker.reductions[i] = unsafe { self.decide(worker, i, &place) };
        }
        let Some(reduction) = &mut worker.reductions[i] else { return };
        if let Some(divergence) = worker.divergences.get_mut(i) {
            // SAFETY: the tile holds the classes (# Safety).
            unsafe { self.add_divergence(divergence, reduction, &place, classes.clone()) };
        }
        let mut ranking = RowRanking::of(call, &mut worker.rankings, &mut worker.entries, i);
        let state = &mut worker.states[i];
        let is_kept = worker.groups[i / ROWS].inputs.is_kept(i % ROWS);
        if call.excluded != Excluded::Largest || !is_kept {
            // SAFETY: the tile holds the classes, this thread's alone (# Safety).
            unsafe {
                let ranking = ranking.as_mut();
                segment::reduce_classes(call, &place, classes, reduction, None, ranking, state);
            }
            return;
        }
        // The largest of this block, for as long as it is the largest of the row.
        // SAFETY: the tile holds the classes (# Safety); the processor has the set of the kernels (`Call::k`).
        let mut found = unsafe {
            let x = place.x.wrapping_add(classes.start * self.lane);
            (call.k.native.argmax)(x, classes.len())
        };
        found.class += classes.start;
        reduction.excluded = Some(found.class);
        // SAFETY: the tile holds the classes, this thread's alone (# Safety).
        unsafe {
            let (classes, ranking) = (classes.clone(), ranking.as_mut());
            segment::reduce_classes(call, &place, classes, reduction, None, ranking, state);
        }
        if classes.start == 0 {
            worker.largest[i] = found;
            return;
        }
        let before = worker.largest[i];
        worker.largest[i].push(found);
        let other = if worker.largest[i].class == before.class { found } else { before };
        // SAFETY: the row is the plan's (# Safety), and so is a class that was the largest of a block of its logits.
        unsafe { self.include(place.at, other, reduction.center, state) };
    }

    /// Adds a block of a row's logits to its divergence.
    ///
    /// # Safety
    /// The classes of the row, which is the plan's, are readable in the lanes' type.
    #[cold]
    unsafe fn add_divergence(
        &self,
        divergence: &mut Divergence,
        reduction: &Reduction,
        place: &PlacedRow,
        classes: Range<usize>,
    ) {
        let center = reduction.center.unwrap_or(0.0);
        let mut logits = [0.0; CONVERTED];
        for class in classes.clone().step_by(CONVERTED) {
            let x = &mut logits[..CONVERTED.min(classes.end - class)];
            for (class, x) in (class..).zip(&mut *x) {
                // SAFETY: the class is readable (# Safety).
                *x = unsafe { self.lane_at(place.x, class) };
            }
            // SAFETY: the row and the classes are the plan's (# Safety).
            unsafe { divergence.add(&self.call, self.loss, place.at, class, x, center) };
        }
    }

    /// What the sweeps over row `i` are to do.
    ///
    /// # Safety
    /// The row's first classes are readable.
    pub unsafe fn decide(&self, worker: &Worker, i: usize, place: &PlacedRow) -> Option<Reduction> {
        let call = &self.call;
        let inputs = &worker.groups[i / ROWS].inputs;
        let factors = &worker.extras[i / ROWS].factors;
        let row = i % ROWS;
        if !operands::needs_reduction(call, inputs, row) {
            return None;
        }
        let sums_exps = operands::needs_exps(call, inputs, row);
        let excluded = match call.excluded {
            Excluded::Target => inputs.class(row),
            Excluded::Largest | Excluded::None => None,
        };
        let mut initial = if sums_exps {
            // SAFETY: the row's first classes are readable (# Safety).
            unsafe { segment::choose_initial_shift(call, place, excluded) }
        } else {
            InitialShift::NONE
        };
        if call.excluded == Excluded::Largest {
            // The shift is that of the largest logit, which the sums leave out as soon as it is found: those of the others
            // may be far smaller.
            initial.is_of_row = false;
        }
        let start = initial.shift.exponent / call.l;
        let center = (call.spreads_mass && inputs.is_kept(row)).then(|| {
            let others = initial.is_of_row.then_some(start);
            match call.excluded {
                Excluded::Target => operands::center(call, inputs, factors, row, start, others),
                Excluded::Largest | Excluded::None => start,
            }
        });
        Some(Reduction { sums_exps, excluded, initial, center })
    }

    /// Adds a class to a state that has excluded it so far.
    ///
    /// # Safety
    /// The row and the class are the plan's.
    unsafe fn include(
        &self,
        at: Position,
        class: ArgMax,
        center: Option<f64>,
        state: &mut RowState,
    ) {
        let call = &self.call;
        let mut x = class.value;
        if let Some(with) = call.plan.transform() {
            operands::transform::<1>(call, with, std::slice::from_mut(&mut x), None);
        }
        if x != f64::NEG_INFINITY {
            let shift = if x.is_finite() { call.shift_at(x) } else { Shift::ZERO };
            let t = (x - shift.logit) * call.l - shift.exponent;
            let e = if x.is_finite() { exp2(t) } else { x };
            state.exps.push(&ExpSum::new(shift, e, 0.0), call.l);
            if call.wants_entropy {
                state.moments.push(&ExpSum::new(shift, e, t * e), call.l);
            }
        }
        if let Some(center) = center {
            let mut mass = 0.0;
            // SAFETY: the row and the class are the plan's (# Safety).
            unsafe { masses::read(call, at, class.class, std::slice::from_mut(&mut mass)) };
            if mass != 0.0 {
                state.weighted_logits.add(mass * (x - center));
            }
        }
    }

    /// The sum of a row's masses, of probability targets: all that a gradient from an lse needs of a first sweep.
    ///
    /// # Safety
    /// The row is the plan's.
    unsafe fn mass(&self, row: usize) -> CompensatedSum {
        let mut sum = CompensatedSum::ZERO;
        for classes in self.blocks() {
            let mut masses = [0.0; VOCABULARY_BLOCK];
            let masses = &mut masses[..classes.len()];
            // SAFETY: the row is the plan's (# Safety), and so are the classes of `blocks`; the processor has the set
            // of the kernels (`Call::k`).
            unsafe {
                masses::read(&self.call, Position { row, inner: 0 }, classes.start, masses);
                sum.merge((self.call.k.lanes.compensated_total)(masses.as_ptr(), masses.len()));
            }
        }
        sum
    }

    /// Runs the row arithmetic, writes the results, and fills in the records.
    ///
    /// # Safety
    /// As [`rows`](Self::rows); the states are complete.
    pub unsafe fn finish(&self, worker: &mut Worker, rows: &[usize], records: &mut [RowRecord]) {
        let call = &self.call;
        if call.excluded == Excluded::Largest {
            for (i, &row) in rows.iter().enumerate() {
                let largest = worker.largest[i];
                let (group, extras) = (&mut worker.groups[i / ROWS], &mut worker.extras[i / ROWS]);
                let (inputs, factors) = (&mut group.inputs, &mut extras.factors);
                // SAFETY: the row is the plan's and this thread's (# Safety), and so is the class, which `reduce` found
                // in a block.
                unsafe {
                    operands::read(call, &span(row), i % ROWS, inputs, Some(factors), &[largest]);
                }
                if inputs.is_kept(i % ROWS) {
                    inputs.x_y[i % ROWS] = largest.value;
                }
            }
            self.transform_excluded(worker, rows.len());
        }
        let Worker { groups, extras, states, reductions, divergences, rankings, entries, .. } =
            worker;
        let mut argmax = [0; ROWS];
        for (index, (rows, records)) in rows.chunks(ROWS).zip(records.chunks_mut(ROWS)).enumerate()
        {
            let (group, extras) = (&mut groups[index], &mut extras[index]);
            group.sums.clear_shift_logits();
            for i in 0..rows.len() {
                let state = &states[index * ROWS + i];
                let reduction = &reductions[index * ROWS + i];
                let center = reduction.and_then(|reduction| reduction.center);
                set_sums(call, i, state, center, group, extras);
                argmax[i] = state.argmax.class;
            }
            call.finish(std::slice::from_mut(group), Some(std::slice::from_mut(extras)));
            for (i, (&row, record)) in rows.iter().zip(records).enumerate() {
                let mut totals = Totals::ZERO;
                if call.computes_losses {
                    operands::add_row(self.loss, group, &argmax, i, &mut totals);
                    // A maximum of zeros of both signs has either sign, which differs from set to set.
                    let max = |_| states[index * ROWS + i].argmax.value + 0.0;
                    // SAFETY: the row is the plan's and this thread's (# Safety).
                    unsafe {
                        operands::write(self.loss, &span(row), i, &group.results, &argmax);
                        shards::write_with(call, &span(row), i, group, extras, &argmax, max);
                        if let Some(to) = &self.loss.kl {
                            let center = extras.weighted.center[i];
                            let kl =
                                divergences[index * ROWS + i].value(group.results.lse[i], center);
                            let kl = if group.inputs.is_kept(i) { kl } else { 0.0 };
                            to.set_real(span(row).at(0), 0, kl);
                        }
                        if let Some(ranking) =
                            RowRanking::of(call, rankings, entries, index * ROWS + i)
                        {
                            ranking.write(call, span(row).first, group.results.lse[i]);
                        }
                    }
                }
                let RowGroup { inputs, sums, coefficients, .. } = &*group;
                let shift = Shift { logit: sums.shift_logit[i], exponent: sums.shift_exponent[i] };
                let mut exps = ExpScale { shift, factor: coefficients.factor[i] };
                if states[index * ROWS + i].exps.sum.is_zero() {
                    // A sum of nothing has the shift 0, from which exponents may be too large.
                    exps = from_initial(call, &reductions[index * ROWS + i], exps);
                }
                *record = RowRecord {
                    row,
                    loss: totals.loss.value(),
                    z_loss: totals.z_loss.value(),
                    entropy_bonus: totals.entropy_bonus.value(),
                    is_correct: totals.correct > 0,
                    excluded: inputs.class(i),
                    entry: coefficients.entry[i],
                    action: coefficients.action(i),
                    exps,
                    bias: if call.has_bias() { coefficients.bias[i] } else { 0.0 },
                    scale: coefficients.scale[i],
                    bonus: bonus(call, i, shift, extras),
                };
            }
        }
    }
}
