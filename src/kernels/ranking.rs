//! The largest logits of a row in their order, and the rank of its target.
//!
//! The order is total: by the logit as stored, the largest first, a NaN before every number, and of equal
//! logits the lower class first. So the state of a row does not depend on the order in which its classes
//! come, and states of disjoint classes merge in any order.

/// The most classes of a row that a call lists.
pub const MOST_TOP: usize = 64;

/// Logits that the first bound of a selection is taken from, at least.
const FIRST_PIECE: usize = 64;

/// A class and its logit as stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry {
    /// The logit.
    pub value: f64,
    /// The class.
    pub class: usize,
}

impl Entry {
    /// Of no class.
    pub const NONE: Entry = Entry { value: 0.0, class: 0 };

    /// Whether the entry comes before another one.
    #[inline(always)]
    pub fn precedes(&self, other: &Entry) -> bool {
        match (self.value.is_nan(), other.value.is_nan()) {
            (false, false) if self.value != other.value => self.value > other.value,
            (true, false) => true,
            (false, true) => false,
            _ => self.class < other.class,
        }
    }
}

/// The logits that a sweep looks for: those above a number, or not below it. A NaN is above every number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// The number, no NaN.
    pub value: f64,
    /// An equal logit is not looked for.
    pub strictly: bool,
}

/// What is known of the order of a row's logits after some of its classes. The entries lie apart, so that
/// there is room for as many as a call asks for.
#[derive(Clone, Copy, Debug)]
pub struct Ranking {
    /// Entries that are taken.
    len: usize,
    /// Classes that were seen.
    seen: usize,
    /// The target, if its rank is wanted.
    target: Option<Entry>,
    /// Classes that precede it.
    preceding: u64,
}

impl Ranking {
    /// No classes seen; the rank of `target` is wanted.
    pub const fn new(target: Option<Entry>) -> Ranking {
        Ranking { len: 0, seen: 0, target, preceding: 0 }
    }

    /// The state of other classes of the same row begins with this.
    pub fn other_classes(&self) -> Ranking {
        Ranking::new(self.target)
    }

    /// The target.
    #[inline(always)]
    pub fn target(&self) -> Option<Entry> {
        self.target
    }

    /// The classes that precede the target; none without one.
    pub fn rank(&self) -> Option<u64> {
        self.target.map(|_| self.preceding)
    }

    /// Adds classes that precede the target.
    #[inline(always)]
    pub fn count(&mut self, preceding: u64) {
        self.preceding += preceding;
    }

    /// Which logits of classes before the target precede it, or of those after it; `None` if none does.
    #[inline(always)]
    pub fn bound_of_target(target: &Entry, before: bool) -> Option<Bound> {
        match (target.value.is_nan(), before) {
            (false, _) => Some(Bound { value: target.value, strictly: !before }),
            // Only a NaN is above infinity.
            (true, true) => Some(Bound { value: f64::INFINITY, strictly: true }),
            (true, false) => None,
        }
    }

    /// Which logits may be among the first, of classes above all that were seen; `None` if none can.
    #[inline(always)]
    pub fn bound(&self, entries: &[Entry]) -> Option<Bound> {
        if self.len < entries.len() {
            return Some(Bound { value: f64::NEG_INFINITY, strictly: false });
        }
        let value = entries.last()?.value;
        (!value.is_nan()).then_some(Bound { value, strictly: true })
    }

    /// How many of the next classes are compared with one bound: as many as were seen, so that the bound of few of
    /// them is out of date.
    #[inline(always)]
    pub fn next_piece(&self) -> usize {
        self.seen.max(FIRST_PIECE)
    }

    /// Counts classes that were compared with a bound.
    #[inline(always)]
    pub fn see(&mut self, classes: usize) {
        self.seen += classes;
    }

    /// Takes an entry in its place, unless all places are taken by entries that precede it.
    pub fn insert(&mut self, entries: &mut [Entry], entry: Entry) {
        let at = entries[..self.len].partition_point(|taken| taken.precedes(&entry));
        if at == entries.len() {
            return;
        }
        let end = (self.len + 1).min(entries.len());
        entries.copy_within(at..end - 1, at + 1);
        entries[at] = entry;
        self.len = end;
    }

    /// Adds the classes that another state of the row has seen.
    pub fn merge(&mut self, entries: &mut [Entry], other: &Ranking, theirs: &[Entry]) {
        for &entry in &theirs[..other.len] {
            self.insert(entries, entry);
        }
        self.seen += other.seen;
        self.preceding += other.preceding;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUES: [f64; 12] = [
        0.5,
        f64::NAN,
        -0.0,
        2.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        2.0,
        0.0,
        f64::NAN,
        f64::NEG_INFINITY,
        1.0,
        f64::INFINITY,
    ];
    const ORDER: [usize; 12] = [1, 8, 4, 11, 3, 6, 10, 0, 2, 7, 5, 9];

    fn entry(class: usize) -> Entry {
        Entry { value: VALUES[class], class }
    }

    #[test]
    fn entries_come_in_order_whatever_the_order_of_the_classes() {
        for step in [1, 5, 7, 11] {
            for count in 0..=VALUES.len() {
                let mut entries = vec![Entry::NONE; count];
                let mut ranking = Ranking::new(None);
                for i in 0..VALUES.len() {
                    ranking.insert(&mut entries, entry(i * step % VALUES.len()));
                }
                let classes: Vec<usize> = entries.iter().map(|entry| entry.class).collect();
                assert_eq!(classes, ORDER[..count], "{count} in steps of {step}");
            }
        }
    }

    #[test]
    fn parts_merge() {
        for split in 0..=VALUES.len() {
            let mut halves = [0..split, split..VALUES.len()].map(|classes| {
                let (mut entries, mut ranking) = ([Entry::NONE; 5], Ranking::new(Some(entry(6))));
                for class in classes {
                    ranking.insert(&mut entries, entry(class));
                    ranking.count(u64::from(entry(class).precedes(&entry(6))));
                }
                (ranking, entries)
            });
            let [(low, low_entries), (high, high_entries)] = &mut halves;
            high.merge(high_entries, low, low_entries);
            assert_eq!(high_entries.map(|entry| entry.class), ORDER[..5]);
            assert_eq!(high.rank(), Some(5));
        }
    }

    /// A logit is within a bound if and only if its entry precedes the one that the bound is of.
    #[test]
    fn bounds_agree_with_the_order() {
        let within = |bound: Option<Bound>, x: f64| {
            bound.is_some_and(|Bound { value, strictly }| {
                x.is_nan() || x > value || !strictly && x == value
            })
        };
        for target in 0..VALUES.len() {
            for class in (0..VALUES.len()).filter(|&class| class != target) {
                let bound = Ranking::bound_of_target(&entry(target), class < target);
                let precedes = entry(class).precedes(&entry(target));
                assert_eq!(within(bound, VALUES[class]), precedes, "{class}, {target}");
            }
        }
    }
}
