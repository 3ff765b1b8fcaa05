// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which ranges of the process are registered with one userfaultfd, and how: plain data.

use super::Modes;
use std::collections::BTreeMap;
use std::ops::Range;

/// The registered ranges, none overlapping another.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// By first address.
    entries: BTreeMap<usize, Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub end: usize,
    pub modes: Modes,
}

impl Ranges {
    /// The range that overlaps this one.
    pub fn overlap(&self, range: &Range<usize>) -> Option<Range<usize>> {
        let (start, entry) = self.entries.range(..range.end).next_back()?;
        (entry.end > range.start && !range.is_empty()).then_some(*start..entry.end)
    }

    /// Notes a range that overlaps none.
    pub fn insert(&mut self, range: Range<usize>, modes: Modes) {
        let end = range.end;
        self.entries.insert(range.start, Entry { end, modes });
    }

    /// The modes of the range that starts there.
    pub fn modes(&self, start: usize) -> Modes {
        self.entries
            .get(&start)
            .map_or(Modes::NONE, |entry| entry.modes)
    }

    /// Notes the modes of the range that starts there.
    pub fn set_modes(&mut self, start: usize, modes: Modes) {
        if let Some(entry) = self.entries.get_mut(&start) {
            entry.modes = modes;
        }
    }

    pub fn remove(&mut self, start: usize) {
        self.entries.remove(&start);
    }

    /// The range that has the address, and its modes.
    pub fn find(&self, address: usize) -> Option<(Range<usize>, Modes)> {
        let (start, entry) = self.entries.range(..=address).next_back()?;
        (address < entry.end).then_some((*start..entry.end, entry.modes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a byte map.
        #[test]
        fn ranges_are_found_and_kept_apart_as_in_a_list(
            requests in prop::collection::vec((0usize..64, 1usize..12, any::<bool>()), 1..40),
        ) {
            let mut ranges = Ranges::default();
            let mut naive: Vec<Option<usize>> = vec![None; 80];
            for (start, length, remove) in requests {
                let range = start..start + length;
                if remove {
                    if let Some((found, _)) = ranges.find(start) {
                        ranges.remove(found.start);
                        naive.iter_mut().filter(|owner| **owner == Some(found.start)).for_each(|owner| *owner = None);
                    }
                    continue;
                }
                let taken = naive[range.clone()].iter().any(Option::is_some);
                prop_assert_eq!(ranges.overlap(&range).is_some(), taken);
                if !taken {
                    ranges.insert(range.clone(), Modes::MISSING);
                    naive[range.clone()].fill(Some(start));
                }
                for (address, owner) in naive.iter().enumerate() {
                    prop_assert_eq!(ranges.find(address).map(|(range, _)| range.start), *owner);
                }
            }
        }
    }
}
