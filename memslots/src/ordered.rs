// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Ordered`]: a sorted map that never changes; an edit makes another one that shares what it did not touch.
//!
//! ```text
//!   firsts   [ 0x0          | 0x8000_0000  | 0x1_4000_0000 ]    the first key of each leaf, side by side
//!   leaves   [ ●            | ●            | ●             ]    shared with the maps before and after
//!              │              │
//!     keys   [ 0x0 0x4000 …] [ 0x8000_0000 … ]                  up to 128 a leaf, side by side
//!     values [  ●    ●    …] [  ●            ]
//! ```
//!
//! A lookup is two binary searches without a branch that could be guessed wrong (std's), each within a few cache lines
//! that nothing else shares, and then one look at the value. An edit copies the two upper arrays and the leaves that it
//! touches: of `n` entries, about `n / 64` words and references and 128 entries, not `n`.

use std::iter::Peekable;
use std::sync::Arc;

/// The entries of a leaf, at most. Around the square root of KVM's limit of slots: an edit copies about as much of the
/// upper level as of a leaf.
const LEAF: usize = 128;

/// Where an entry is, in one particular map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    leaf: u32,
    index: u32,
}

impl Place {
    pub(crate) const FIRST: Self = Self { leaf: 0, index: 0 };
}

/// A sorted map from `u64`, unique keys. Adjacent leaves hold more than [`LEAF`] entries together, none is empty.
pub(crate) struct Ordered<V> {
    firsts: Vec<u64>,
    leaves: Vec<Leaf<V>>,
    len: usize,
}

/// Both of one length.
struct Leaf<V> {
    keys: Arc<[u64]>,
    values: Arc<[V]>,
}

impl<V> Ordered<V> {
    pub(crate) const fn new() -> Self {
        Self {
            firsts: Vec::new(),
            leaves: Vec::new(),
            len: 0,
        }
    }

    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// The entry with the greatest key that is not above `key`.
    #[inline]
    pub(crate) fn floor(&self, key: u64) -> Option<(Place, u64, &V)> {
        let leaf = self
            .firsts
            .partition_point(|first| *first <= key)
            .checked_sub(1)?;
        let entries = self.leaves.get(leaf)?;
        // Never 0: the leaf's first key is not above.
        let index = entries
            .keys
            .partition_point(|other| *other <= key)
            .checked_sub(1)?;
        let place = Place {
            leaf: leaf as u32,
            index: index as u32,
        };
        Some((place, *entries.keys.get(index)?, entries.values.get(index)?))
    }

    /// The entry with this very key.
    pub(crate) fn get(&self, key: u64) -> Option<&V> {
        match self.floor(key)? {
            (_, found, value) if found == key => Some(value),
            _ => None,
        }
    }

    /// The entry at a place that this map gave.
    #[inline]
    pub(crate) fn at(&self, place: Place) -> Option<&V> {
        self.leaves
            .get(place.leaf as usize)?
            .values
            .get(place.index as usize)
    }

    /// All entries, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &V)> {
        self.leaves
            .iter()
            .flat_map(|leaf| leaf.keys.iter().copied().zip(leaf.values.iter()))
    }

    /// The bytes that it takes up, the values' own allocations aside; shared leaves count in each map.
    pub(crate) fn memory(&self) -> usize {
        let leaf = |leaf: &Leaf<V>| {
            // Two counters before each array.
            size_of_val(&*leaf.keys) + size_of_val(&*leaf.values) + 4 * size_of::<usize>()
        };
        let upper = size_of::<u64>() * self.firsts.capacity()
            + size_of::<Leaf<V>>() * self.leaves.capacity();
        upper + self.leaves.iter().map(leaf).sum::<usize>()
    }
}

impl<V: Clone> Ordered<V> {
    /// This map without the keys `gone` and with `added` (sorted both; a key that is added is not there or gone).
    pub(crate) fn edited(&self, gone: &[u64], added: Vec<(u64, V)>) -> Self {
        // No more leaves than there were, and as many as what is added fills.
        let room = self.leaves.len() + added.len() / (LEAF / 2) + 2;
        let mut next = Self {
            firsts: Vec::with_capacity(room),
            leaves: Vec::with_capacity(room),
            len: 0,
        };
        let mut gone = gone.iter().copied().peekable();
        let mut added = added.into_iter().peekable();
        for (number, leaf) in self.leaves.iter().enumerate() {
            // What lies before the next leaf belongs here, and to the first leaf also what lies before it.
            let end = self.firsts.get(number + 1).copied();
            let here = |key: u64| end.is_none_or(|end| key < end);
            let is_touched = gone.peek().is_some_and(|key| here(*key))
                || added.peek().is_some_and(|(key, _)| here(*key));
            if is_touched {
                next.push(merged(leaf, &mut gone, &mut added, here));
            } else {
                next.push_leaf(leaf);
            }
        }
        // Only an empty map has come here with something left.
        next.push(added.collect());
        next
    }

    fn push_leaf(&mut self, leaf: &Leaf<V>) {
        let small = self
            .leaves
            .last()
            .is_some_and(|last| last.keys.len() + leaf.keys.len() <= LEAF);
        if small {
            return self.push(leaf.entries().collect());
        }
        self.append(leaf.clone());
    }

    /// Appends `entries` in as many leaves as they need, together with the last leaf if one is enough for both.
    fn push(&mut self, mut entries: Vec<(u64, V)>) {
        if entries.is_empty() {
            return;
        }
        let small = |last: &Leaf<V>| last.keys.len() + entries.len() <= LEAF;
        if self.leaves.last().is_some_and(small)
            && let Some(last) = self.leaves.pop()
        {
            self.firsts.pop();
            self.len -= last.keys.len();
            entries.splice(0..0, last.entries());
        }
        // Of equal size, so that the next entry splits none of them again.
        let leaves = entries.len().div_ceil(LEAF);
        for entries in entries.chunks(entries.len().div_ceil(leaves)) {
            self.append(Leaf {
                keys: entries.iter().map(|(key, _)| *key).collect(),
                values: entries.iter().map(|(_, value)| value.clone()).collect(),
            });
        }
    }

    fn append(&mut self, leaf: Leaf<V>) {
        if let Some(first) = leaf.keys.first() {
            self.firsts.push(*first);
            self.len += leaf.keys.len();
            self.leaves.push(leaf);
        }
    }
}

/// The entries of `leaf` without what is gone and with what is added, as far as they belong `here`.
fn merged<V: Clone>(
    leaf: &Leaf<V>,
    gone: &mut Peekable<impl Iterator<Item = u64>>,
    added: &mut Peekable<impl Iterator<Item = (u64, V)>>,
    here: impl Fn(u64) -> bool,
) -> Vec<(u64, V)> {
    let mut entries = Vec::with_capacity(leaf.keys.len() + 1);
    for (key, value) in leaf.entries() {
        while let Some(new) = added.next_if(|(new, _)| *new < key) {
            entries.push(new);
        }
        while gone.next_if(|gone| *gone < key).is_some() {}
        if gone.next_if(|gone| *gone == key).is_none() {
            entries.push((key, value));
        }
    }
    while let Some(new) = added.next_if(|(new, _)| here(*new)) {
        entries.push(new);
    }
    while gone.next_if(|gone| here(*gone)).is_some() {}
    entries
}

impl<V: Clone> Leaf<V> {
    fn entries(&self) -> impl Iterator<Item = (u64, V)> {
        self.keys.iter().copied().zip(self.values.iter().cloned())
    }
}

impl<V> Clone for Leaf<V> {
    fn clone(&self) -> Self {
        Self {
            keys: Arc::clone(&self.keys),
            values: Arc::clone(&self.values),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn is_sound(map: &Ordered<u32>) {
        assert_eq!(map.firsts.len(), map.leaves.len());
        assert_eq!(map.len, map.iter().count());
        for (first, leaf) in map.firsts.iter().zip(&map.leaves) {
            assert_eq!(Some(first), leaf.keys.first());
            assert_eq!(leaf.keys.len(), leaf.values.len());
            assert!(leaf.keys.len() <= LEAF);
        }
        for pair in map.leaves.windows(2) {
            assert!(pair[0].keys.len() + pair[1].keys.len() > LEAF);
        }
        let keys: Vec<_> = map.iter().map(|(key, _)| key).collect();
        assert!(keys.is_sorted_by(|a, b| a < b));
    }

    type Edit = (BTreeSet<u64>, BTreeMap<u64, u32>);

    fn edits() -> impl Strategy<Value = Vec<Edit>> {
        let key = || prop_oneof![0..1500u64, u64::MAX - 3..=u64::MAX];
        let some = |most: usize| {
            let gone = proptest::collection::btree_set(key(), 0..most);
            let added = proptest::collection::btree_map(key(), any::<u32>(), 0..most);
            (gone, added)
        };
        proptest::collection::vec(prop_oneof![some(600), some(4)], 1..12)
    }

    proptest! {
        #[test]
        fn every_edit_gives_what_a_naive_map_has_and_changes_no_map_before(edits in edits()) {
            let (mut map, mut naive) = (Ordered::new(), BTreeMap::new());
            for (gone, mut added) in edits {
                let before: Vec<_> = map.iter().map(|(key, value)| (key, *value)).collect();
                added.retain(|key, _| gone.contains(key) || !naive.contains_key(key));
                let gone: Vec<_> = gone.into_iter().collect();
                let next = map.edited(&gone, added.clone().into_iter().collect());
                naive.retain(|key, _| !gone.contains(key));
                naive.extend(added);
                is_sound(&next);
                prop_assert!(next.iter().map(|(key, value)| (key, *value)).eq(naive.clone()));
                prop_assert!(map.iter().map(|(key, value)| (key, *value)).eq(before));
                for key in (0..1510).chain(u64::MAX - 5..=u64::MAX) {
                    let floor = next.floor(key).map(|(place, key, value)| {
                        assert_eq!(next.at(place), Some(value));
                        (key, *value)
                    });
                    let expected = naive.range(..=key).next_back().map(|(key, value)| (*key, *value));
                    prop_assert_eq!(floor, expected);
                    prop_assert_eq!(next.get(key), naive.get(&key));
                }
                map = next;
            }
        }
    }

    #[test]
    fn an_edit_copies_the_leaves_that_it_touches_and_no_other() {
        let all = (0..32_000).map(|key| (key * 2, 0)).collect();
        let map = Ordered::<u32>::new().edited(&[], all);
        let next = map.edited(&[20_000], vec![(40_001, 1)]);
        is_sound(&next);
        let shared = |leaf: &&Leaf<u32>| Arc::strong_count(&leaf.keys) == 2;
        assert!(map.leaves.len() - map.leaves.iter().filter(shared).count() <= 2);
    }
}
