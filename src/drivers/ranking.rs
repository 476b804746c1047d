//! The results that come from the order of a row's logits: the largest of them, their log-probabilities, and the
//! rank of the target.
//!
//! A row is taken in chunk by chunk, while each is in the cache and before anything overwrites it. A sweep marks
//! the few logits of a chunk that are within a bound, and only those are looked at one by one.

use super::call::Call;
use super::operands;
use super::place::Place;
use crate::kernels::contiguous::reduce::{CHUNK_WORDS, WORD};
use crate::kernels::ranking::{Bound, Entry, MOST_TOP, Ranking};
use crate::kernels::scratch::Scratch;
use crate::plan::{self, Target};
use crate::strategy::{CHUNK, RANKED, RANKED_ENTRIES};
use crate::view::{ElementType, Position};

/// A row's state, and its entries.
pub struct RowRanking<'a> {
    /// The state.
    pub state: &'a mut Ranking,
    /// As many as classes are listed.
    pub entries: &'a mut [Entry],
}

/// The states of up to `N` rows, with room for `E` entries.
pub struct Rankings<const N: usize, const E: usize> {
    states: [Ranking; N],
    entries: [Entry; E],
    /// Entries of a row.
    count: usize,
}

/// The state of one row.
pub type OneRanking = Rankings<1, MOST_TOP>;

impl<const N: usize, const E: usize> Rankings<N, E> {
    /// Of no rows yet. A constant, so that it is made where it stays.
    pub const EMPTY: Self =
        Rankings { states: [Ranking::new(None); N], entries: [Entry::NONE; E], count: 0 };

    /// The rows that there is room for, of a call that lists so many classes.
    fn capacity(count: usize) -> usize {
        N.min(E / count.max(1))
    }

    /// Begins with some rows, for which there is room. The first becomes row 0.
    ///
    /// # Safety
    /// The rows are the call's, whose logits lie in the caller's memory and are as stored; no other thread writes them.
    pub unsafe fn start(&mut self, call: &Call, rows: impl Iterator<Item = Position>) {
        self.count = call.rankings.map_or(0, |rankings| rankings.top_count);
        for (state, at) in self.states.iter_mut().zip(rows) {
            // SAFETY: the row is the call's (# Safety).
            *state = Ranking::new(unsafe { target(call, at) });
        }
    }

    /// Begins with the rows that other states of theirs began with.
    pub fn start_like(&mut self, other: &Self) {
        self.count = other.count;
        for (state, other) in self.states.iter_mut().zip(&other.states) {
            *state = other.other_classes();
        }
    }

    /// Row `i`.
    #[inline(always)]
    pub fn row(&mut self, i: usize) -> RowRanking<'_> {
        let entries = &mut self.entries[i * self.count..][..self.count];
        RowRanking { state: &mut self.states[i], entries }
    }
}

/// The target of a row with its logit as stored, if its rank is wanted and the row counts.
///
/// # Safety
/// The row is the call's, whose logits lie in the caller's memory and are as stored; no other thread writes them.
unsafe fn target(call: &Call, at: Position) -> Option<Entry> {
    let loss = call.loss.filter(|_| wants_ranks(call))?;
    // SAFETY: the row is the call's (# Safety), and the logits cover its target, which is in range (validation).
    unsafe {
        match loss.target(at) {
            Target::Class(class) => Some(Entry { value: call.plan.logits.real(at, class), class }),
            Target::Absent | Target::Ignored | Target::Distribution => None,
        }
    }
}

/// Whether the ranks of targets are a result.
#[inline(always)]
pub fn wants_ranks(call: &Call) -> bool {
    call.rankings.is_some_and(|rankings| rankings.target_ranks.is_some())
}

impl<'a> RowRanking<'a> {
    /// Row `i` of some whose states and entries lie in memory of the caller, if the call has rankings.
    #[inline(always)]
    pub fn of(
        call: &Call,
        states: &'a mut [Ranking],
        entries: &'a mut [Entry],
        i: usize,
    ) -> Option<RowRanking<'a>> {
        let count = call.rankings?.top_count;
        let entries = &mut entries[i * count..][..count];
        Some(RowRanking { state: &mut states[i], entries })
    }

    /// Takes in the `len` classes from `class` on, whose logits are at `x`, all above those that it has seen.
    ///
    /// # Safety
    /// `x` is readable for `len` logits of the call's type, at most CHUNK.
    #[inline(never)]
    pub unsafe fn add(&mut self, call: &Call, x: *const u8, class: usize, len: usize) {
        let size = call.plan.logits.dtype.size();
        let mut found = [0; CHUNK_WORDS];
        let mut find = |start: usize, len: usize, bound: &Bound| {
            // SAFETY: the logits are within those at `x` (# Safety): both callers below cut `len` of them. The processor
            // has the set of the kernels (`Call::k`).
            unsafe { (call.k.native.find)(x.wrapping_add(start * size), len, bound, &mut found) };
            found
        };
        if let Some(target) = self.state.target() {
            // Classes before the target, and after it.
            let before = target.class.saturating_sub(class).min(len);
            let after = (target.class + 1).saturating_sub(class).min(len);
            for (is_before, start, end) in [(true, 0, before), (false, after, len)] {
                let bound = Ranking::bound_of_target(&target, is_before);
                if let Some(bound) = bound.filter(|_| start < end) {
                    let words = find(start, end - start, &bound);
                    let words = words.iter().take((end - start).div_ceil(WORD));
                    self.state.count(words.map(|word| u64::from(word.count_ones())).sum());
                }
            }
        }
        if self.entries.is_empty() {
            return;
        }
        let mut start = 0;
        while start < len {
            let piece = self.state.next_piece().min(len - start);
            if let Some(bound) = self.state.bound(self.entries) {
                let words = find(start, piece, &bound);
                for (word, bits) in words.iter().enumerate().take(piece.div_ceil(WORD)) {
                    let mut bits = *bits;
                    while bits != 0 {
                        let at = start + word * WORD + bits.trailing_zeros() as usize;
                        bits &= bits - 1;
                        // SAFETY: the sweep has bits for logits of the piece alone, which are readable (# Safety).
                        let value = unsafe { call.plan.logits.dtype.read(x, at) };
                        self.state.insert(self.entries, Entry { value, class: class + at });
                    }
                }
            }
            self.state.see(piece);
            start += piece;
        }
    }

    /// Takes in the classes that another state of the row has seen.
    pub fn merge(&mut self, other: &Ranking, entries: &[Entry]) {
        self.state.merge(self.entries, other, entries);
    }

    /// Writes the results of a row whose lse is known, if it is needed.
    ///
    /// # Safety
    /// The row is the call's, and no other thread accesses its results; all of its classes were taken in.
    #[cold]
    #[inline(never)]
    pub unsafe fn write(&self, call: &Call, at: Position, lse: f64) {
        let Some(rankings) = call.rankings else { return };
        if let Some(view) = &rankings.top_classes {
            for (i, entry) in self.entries.iter().enumerate() {
                // SAFETY: the result covers as many classes of the row as there are entries (validation), and is this
                // thread's (# Safety).
                unsafe { view.set_integer(at, i, entry.class as i64) };
            }
        }
        if let Some(view) = &rankings.top_log_probs {
            let mut values = [0.0; MOST_TOP];
            let values = &mut values[..self.entries.len()];
            for (value, entry) in values.iter_mut().zip(&*self.entries) {
                *value = entry.value;
            }
            if let Some(with) = call.plan.transform() {
                operands::transform::<MOST_TOP>(call, with, values, None);
            }
            let lse = if call.takes_exps { lse } else { 0.0 };
            for (i, value) in values.iter().enumerate() {
                // SAFETY: the result covers as many classes of the row as there are entries (validation), and is this
                // thread's (# Safety).
                unsafe { view.set_real(at, i, value - lse) };
            }
        }
        if let Some(view) = &rankings.target_ranks {
            let rank = self.state.rank().map_or(IGNORED, |rank| rank as i64);
            // SAFETY: the result covers the row (validation), and is this thread's (# Safety).
            unsafe { view.set_integer(at, 0, rank) };
        }
    }
}

/// The rank of an ignored row's target.
const IGNORED: i64 = -1;

/// Writes the rank of a row that is ignored and takes part in nothing else.
///
/// # Safety
/// The row is the call's, and no other thread accesses its results.
pub unsafe fn write_ignored(call: &Call, at: Position) {
    if let Some(plan::Rankings { target_ranks: Some(view), .. }) = call.rankings {
        // SAFETY: the result covers the row (validation), and is this thread's (# Safety).
        unsafe { view.set_integer(at, 0, IGNORED) };
    }
}

/// The states of distributions that are neighbours.
type PlaceRanking = Rankings<RANKED, RANKED_ENTRIES>;

/// Classes that are brought side by side at a time.
const GATHERED: usize = 128;

/// Takes in the logits of some distributions, wherever they lie, and writes the results. `lse` has that of each, if it
/// is needed, and is not read else.
///
/// # Safety
/// The distributions are the call's, and no other thread accesses them. Their logits are as stored.
#[cold]
#[inline(never)]
pub unsafe fn rank(call: &Call, place: &Place, lse: &[f64]) {
    let Some(rankings) = call.rankings else { return };
    let mut ranking = PlaceRanking::EMPTY;
    let some = PlaceRanking::capacity(rankings.top_count);
    for start in (0..place.len).step_by(some) {
        let place = place.part(start, some);
        // SAFETY: the distributions are the call's, and their logits as stored (# Safety).
        unsafe {
            ranking.start(call, (0..place.len).map(|i| place.at(i)));
            take_in(call, &place, &mut ranking);
            for i in 0..place.len {
                let lse = if rankings.top_log_probs.is_some() { lse[start + i] } else { 0.0 };
                ranking.row(i).write(call, place.at(i), lse);
            }
        }
    }
}

/// # Safety
/// As [`rank`], of distributions that the states have begun with.
unsafe fn take_in(call: &Call, place: &Place, ranking: &mut PlaceRanking) {
    let (view, classes) = (&call.plan.logits, call.plan.shape.classes);
    let step = view.strides[1];
    let mut room = Scratch::<GATHERED>::new();
    let (is_contiguous, size) = (step == 1 || classes == 1, view.dtype.size());
    let most = if is_contiguous { CHUNK } else { GATHERED };
    for class in (0..classes).step_by(most) {
        let len = most.min(classes - class);
        for i in 0..place.len {
            // SAFETY: the logits cover the class of the distribution (validation).
            let from = unsafe { view.at(place.at(i), class) }.cast_const();
            let mut x = from;
            if !is_contiguous {
                x = room.start();
                // SAFETY: the logits cover the classes (validation), and the room has an element of 8 bytes for each.
                unsafe {
                    match size {
                        2 => gather::<u16>(from, step, len, room.start()),
                        4 => gather::<u32>(from, step, len, room.start()),
                        _ => gather::<u64>(from, step, len, room.start()),
                    }
                }
            }
            // SAFETY: `len` logits from `x` on are readable: those of the distribution, or their copies.
            unsafe { ranking.row(i).add(call, x, class, len) };
        }
    }
}

/// Copies elements that are `step` apart.
///
/// # Safety
/// `from` is readable for `len` aligned elements of `T`, `step` apart, and `to` writable for as many side by side.
unsafe fn gather<T: Copy>(from: *const u8, step: isize, len: usize, to: *mut u8) {
    let (from, to) = (from.cast::<T>(), to.cast::<T>());
    for i in 0..len {
        // SAFETY: element `i` is one of `len` (# Safety).
        unsafe { *to.add(i) = *from.wrapping_offset(i as isize * step) };
    }
}
