// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A set of numbers as disjoint intervals: pages read, pages given back.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ascending, disjoint, never touching intervals: start to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Intervals {
    by_start: BTreeMap<u64, u64>,
}

impl Intervals {
    /// Adds a range; what it touches or overlaps becomes one with it.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        while let Some((&from, &to)) = self.by_start.range(..=end).next_back() {
            if to < start {
                break;
            }
            self.by_start.remove(&from);
            start = start.min(from);
            end = end.max(to);
        }
        self.by_start.insert(start, end);
    }

    /// Whether it has this one.
    pub fn contains(&self, at: u64) -> bool {
        let before = self.by_start.range(..=at).next_back();
        before.is_some_and(|(_, end)| at < *end)
    }

    /// Calls `each` with the parts of the range that it has not, ascending.
    pub fn missing(&self, range: Range<u64>, mut each: impl FnMut(Range<u64>)) {
        let mut at = range.start;
        if let Some((_, &end)) = self.by_start.range(..=at).next_back() {
            at = at.max(end);
        }
        for (&start, &end) in self.by_start.range(range.start..) {
            if start >= range.end {
                break;
            }
            if at < start {
                each(at..start);
            }
            at = at.max(end);
        }
        if at < range.end {
            each(at..range.end);
        }
    }

    /// The intervals, ascending.
    #[cfg(test)]
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.by_start.iter().map(|(start, end)| *start..*end)
    }

    /// How many intervals there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.by_start.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn a_set_of_intervals_is_a_set_of_numbers(
            ranges in proptest::collection::vec((0u64..60, 0u64..9), 0..20), ask in (0u64..60, 0u64..30),
        ) {
            let (mut intervals, mut model) = (Intervals::default(), BTreeSet::new());
            for (start, size) in ranges {
                intervals.insert(start..start + size);
                model.extend(start..start + size);
            }
            for at in 0..80 {
                prop_assert_eq!(intervals.contains(at), model.contains(&at));
            }
            let told: Vec<u64> = intervals.iter().flatten().collect();
            prop_assert_eq!(told, model.iter().copied().collect::<Vec<_>>());
            let apart: Vec<_> = intervals.iter().collect();
            prop_assert!(apart.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert_eq!(apart.len(), intervals.len());

            let range = ask.0..ask.0 + ask.1;
            let mut missing = Vec::new();
            intervals.missing(range.clone(), |part| missing.extend(part));
            let expected: Vec<u64> = range.filter(|at| !model.contains(at)).collect();
            prop_assert_eq!(missing, expected);
        }
    }
}
