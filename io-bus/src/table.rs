// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The ranges of one bus, sorted: an immutable value that every change replaces by the next one.
//!
//! This is `struct kvm_io_bus` as plain data. Nothing here knows what a device is, so the rules of
//! lookup are tested on tables of numbers.
//!
//! # Order
//!
//! Rows are sorted by first address, then by last address, then by age. Of the rows that hold an
//! access whole, the first in this order is asked first. For ranges that are disjoint, equal or
//! begin together, this is KVM's order as well. For ranges that overlap in another way KVM's order
//! depends on the history of registrations, and its search may miss a range; here the answer
//! depends on the ranges alone and none is missed.
//!
//! # How a lookup finds every candidate
//!
//! ```text
//!   rows by base     0        1        2          3
//!                    |-------------------|
//!                             |----|
//!                                      |----|     |---|
//!   window           0        0        0          3
//! ```
//!
//! A binary search over the bases finds the last row that begins at or before the address. Rows
//! after it begin too late. `window` of that row is the first row that reaches as far as its base,
//! so everything before the window ended too early. Between the two, each row is checked. Where
//! ranges do not overlap, the window is the row itself.

use std::hint::select_unpredictable;
use std::sync::Arc;

use crate::dispatcher::unlikely;
use crate::range::IoRange;

/// Names one row for as long as its registration lives, and says how old it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RowId(pub(crate) u64);

/// One range and what is at it. The range's parts lie apart so that a row is 64 bytes.
#[derive(Clone, Debug)]
pub(crate) struct Row<D> {
    base: u64,
    last: u64,
    /// The range's size if no other row shares an address with it, so that who it holds needs no
    /// search for others; otherwise 0. 0 also for all of the address space, which needs more bits,
    /// and where cookies are not to be used; 1 for an exact address.
    alone: u64,
    /// Index of the first row that could hold an access at this row's base or later.
    window: u32,
    exact: bool,
    id: RowId,
    device: D,
}

impl<D> Row<D> {
    fn new(id: RowId, range: IoRange, device: D) -> Self {
        Self {
            base: range.base(),
            last: range.last(),
            alone: 0,
            window: 0,
            exact: range.is_exact(),
            id,
            device,
        }
    }

    #[inline]
    pub(crate) fn range(&self) -> IoRange {
        IoRange::from_parts(self.base, self.last, self.exact)
    }

    #[inline]
    pub(crate) fn device(&self) -> &D {
        &self.device
    }
}

/// The sorted rows. A clone shares them.
#[derive(Debug)]
pub(crate) struct Table<D> {
    /// The bases of `rows`, apart, so that a search touches eight a cache line.
    bases: Arc<[u64]>,
    rows: Arc<[Row<D>]>,
    /// Whether every access is searched for: no row is at a cookie.
    searched: bool,
}

impl<D> Clone for Table<D> {
    fn clone(&self) -> Self {
        Self {
            bases: Arc::clone(&self.bases),
            rows: Arc::clone(&self.rows),
            searched: self.searched,
        }
    }
}

impl<D> Default for Table<D> {
    fn default() -> Self {
        Self {
            bases: Arc::new([]),
            rows: Arc::new([]),
            searched: false,
        }
    }
}

impl<D> Table<D> {
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(crate) fn rows(&self) -> &[Row<D>] {
        &self.rows
    }

    /// The row that `cookie` names, if it can only be this one that answers.
    ///
    /// A cookie is a row's index in whatever table was searched last. It need not come from this
    /// one: that the row holds the access and that no other row overlaps it is checked here and
    /// now, so a stale cookie misses, or hits rightly.
    #[inline]
    pub(crate) fn at_cookie(&self, cookie: usize, address: u64, len: usize) -> Option<&Row<D>> {
        let row = self.rows.get(cookie)?;
        // As `IoRange::holds`, in one subtraction and two comparisons: a length of 0 wraps, and is
        // more than any size.
        let offset = address.wrapping_sub(row.base);
        let last = (len as u64).wrapping_sub(1);
        if row.alone >= offset && row.alone - offset > last {
            return Some(row);
        }
        unlikely();
        (row.exact && row.alone != 0 && offset == 0 && len != 0).then_some(row)
    }

    /// The rows that hold the access whole, in the order in which they are asked, each with its
    /// cookie.
    #[inline]
    pub(crate) fn candidates(
        &self,
        address: u64,
        len: usize,
    ) -> impl Iterator<Item = (usize, &Row<D>)> {
        let end = count_up_to(&self.bases, address);
        let start = match end.checked_sub(1).and_then(|last| self.rows.get(last)) {
            Some(row) => row.window as usize,
            None => end,
        };
        self.rows
            .get(start..end)
            .unwrap_or_default()
            .iter()
            .zip(start..)
            .filter(move |(row, _)| row.range().holds(address, len))
            .map(|(row, index)| (index, row))
    }

    pub(crate) fn find(&self, id: RowId) -> Option<&Row<D>> {
        self.rows.iter().find(|row| row.id == id)
    }
}

impl<D: Clone> Table<D> {
    /// The table with one row more.
    pub(crate) fn with(&self, id: RowId, range: IoRange, device: D) -> Self {
        let mut rows = Vec::with_capacity(self.rows.len() + 1);
        rows.extend(self.rows.iter().cloned());
        rows.push(Row::new(id, range, device));
        Self::build(rows, self.searched)
    }

    /// The table without the row `id`, or `None` if there is none.
    pub(crate) fn without(&self, id: RowId) -> Option<Self> {
        self.find(id)?;
        let rest = self.rows.iter().filter(|row| row.id != id);
        Some(Self::build(rest.cloned().collect(), self.searched))
    }

    /// The table with the row `id` at another range, or `None` if there is none. It keeps its age.
    pub(crate) fn moved(&self, id: RowId, range: IoRange) -> Option<Self> {
        let mut rows = self.rows.to_vec();
        let row = rows.iter_mut().find(|row| row.id == id)?;
        *row = Row::new(id, range, row.device.clone());
        Some(Self::build(rows, self.searched))
    }

    /// The same rows with other contents, with or without cookies.
    pub(crate) fn map(&self, searched: bool, mut content: impl FnMut(&D) -> D) -> Self {
        let rows = self.rows.iter().map(|row| Row {
            device: content(&row.device),
            ..row.clone()
        });
        Self::build(rows.collect(), searched)
    }

    fn build(mut rows: Vec<Row<D>>, searched: bool) -> Self {
        rows.sort_by_key(|row| (row.base, row.last, row.id));

        // `window` never goes back from one row to the next: what ended before this base has ended
        // before the next base too. So one pass of two indices finds them all.
        let mut window = 0;
        let mut reach: Option<u64> = None;
        for index in 0..rows.len() {
            let base = rows[index].base;
            while rows[window].last < base {
                window += 1;
            }
            let last = rows[index].last;
            let next = rows.get(index + 1).map(|row| row.base);
            rows[index].window = window as u32;
            let alone =
                reach.is_none_or(|reach| reach < base) && next.is_none_or(|next| next > last);
            rows[index].alone = match alone && !searched {
                true => (last - base).wrapping_add(1),
                false => 0,
            };
            reach = reach.max(Some(last));
        }

        Self {
            bases: rows.iter().map(|row| row.base).collect(),
            rows: rows.into(),
            searched,
        }
    }
}

/// How many of the sorted `bases` are at or before `address`.
///
/// A guest's next address can not be foretold, so the search has no branch on it: the number of
/// steps is the table's, and each step selects.
#[inline]
fn count_up_to(bases: &[u64], address: u64) -> usize {
    // The last base at or before the address, if there is one, is in `start..start + rest`.
    let mut start = 0;
    let mut rest = bases.len();
    while rest > 1 {
        let half = rest / 2;
        let middle = start + half;
        // Always there; a length that the compiler knew would spare the check, which costs nothing.
        let Some(base) = bases.get(middle) else { break };
        start = select_unpredictable(*base <= address, middle, start);
        rest -= half;
    }
    match bases.get(start) {
        Some(base) => start + usize::from(*base <= address),
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the documentation says, as slowly as it can be said.
    #[derive(Clone, Debug, Default)]
    struct Model(Vec<(RowId, IoRange)>);

    impl Model {
        fn candidates(&self, address: u64, len: usize) -> Vec<RowId> {
            let mut held: Vec<_> = self
                .0
                .iter()
                .filter(|(_, range)| range.holds(address, len))
                .map(|(id, range)| (range.base(), range.last(), *id))
                .collect();
            held.sort();
            held.into_iter().map(|(_, _, id)| id).collect()
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Add(IoRange),
        Remove(usize),
        Move(usize, IoRange),
    }

    /// Few addresses, so that ranges touch, nest and repeat; at either end of the address space.
    fn range() -> impl Strategy<Value = IoRange> {
        let low = (0u64..48, 0u64..20);
        let high = (0u64..48, 0u64..20).prop_map(|(back, size)| {
            let base = u64::MAX - back;
            (base, size.min(back + 1))
        });
        prop_oneof![4 => low, 1 => high].prop_map(|(base, size)| match size {
            0 => IoRange::exact(base),
            size => IoRange::new(base, size).unwrap(),
        })
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => range().prop_map(Step::Add),
            1 => any::<usize>().prop_map(Step::Remove),
            1 => (any::<usize>(), range()).prop_map(|(n, range)| Step::Move(n, range)),
        ]
    }

    fn compare(table: &Table<RowId>, model: &Model) -> Result<(), TestCaseError> {
        let spots = (0..70u64).chain((0..50).map(|back| u64::MAX - back));
        for address in spots {
            for len in [0, 1, 2, 4, 8, 17] {
                let found: Vec<_> = table.candidates(address, len).collect();
                let ids: Vec<_> = found.iter().map(|(_, row)| *row.device()).collect();
                prop_assert_eq!(&ids, &model.candidates(address, len));
                // A cookie, right or wrong, gives the one candidate or nothing.
                for cookie in 0..table.len() + 1 {
                    if let Some(row) = table.at_cookie(cookie, address, len) {
                        prop_assert_eq!(&ids, &vec![*row.device()]);
                    }
                }
                // It does hit where nothing else shares the range.
                if let [(cookie, row)] = found[..] {
                    let shared = model
                        .0
                        .iter()
                        .any(|(id, r)| *id != *row.device() && r.overlaps(&row.range()));
                    let hit = table.at_cookie(cookie, address, len).is_some();
                    prop_assert_eq!(hit, !shared);
                }
            }
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn a_table_answers_as_its_rules_read(steps in prop::collection::vec(step(), 1..40)) {
            let mut table = Table::default();
            let mut model = Model::default();
            for (age, step) in steps.into_iter().enumerate() {
                let before = table.clone();
                match step {
                    Step::Add(range) => {
                        let id = RowId(age as u64);
                        table = table.with(id, range, id);
                        model.0.push((id, range));
                    }
                    Step::Remove(n) if !model.0.is_empty() => {
                        let (id, _) = model.0.remove(n % model.0.len());
                        table = table.without(id).unwrap();
                        prop_assert!(table.without(id).is_none());
                        prop_assert!(table.moved(id, IoRange::exact(0)).is_none());
                    }
                    Step::Move(n, range) if !model.0.is_empty() => {
                        let n = n % model.0.len();
                        model.0[n].1 = range;
                        table = table.moved(model.0[n].0, range).unwrap();
                    }
                    Step::Remove(_) | Step::Move(..) => {}
                }
                prop_assert_eq!(table.len(), model.0.len());
                // The old table is a value: whoever reads it still sees what it was.
                prop_assert!(before.len().abs_diff(table.len()) <= 1);
            }
            compare(&table, &model)?;
        }
    }

    #[test]
    fn devices_that_share_a_range_are_asked_oldest_first() {
        let range = IoRange::new(0x60, 4).unwrap();
        let table = Table::default()
            .with(RowId(7), range, 'a')
            .with(RowId(3), range, 'b')
            .with(RowId(9), range, 'c');
        let order: String = table
            .candidates(0x61, 2)
            .map(|(_, r)| *r.device())
            .collect();
        assert_eq!(order, "bac");
    }

    #[test]
    fn under_observation_no_row_is_at_a_cookie() {
        let range = |base| IoRange::new(base, 4).unwrap();
        let cookies = |table: &Table<u64>| -> Vec<bool> {
            let at = |n| table.at_cookie(n as usize, n * 8, 1).is_some();
            (0..table.len() as u64).map(at).collect()
        };
        let mut table = Table::default();
        for n in 0..3 {
            table = table.with(RowId(n), range(n * 8), n);
        }
        assert_eq!(cookies(&table), [true; 3]);

        let watched = table.map(true, |n| *n);
        assert_eq!(cookies(&watched), [false; 3]);
        let changed = watched
            .with(RowId(3), range(24), 3)
            .moved(RowId(0), range(4))
            .and_then(|table| table.without(RowId(1)));
        assert_eq!(cookies(&changed.unwrap()), [false; 3]);
        assert_eq!(cookies(&watched.map(false, |n| *n)), [true; 3]);
    }

    #[test]
    fn a_range_far_below_that_reaches_over_others_is_found() {
        let mut table = Table::default().with(RowId(0), IoRange::new(0, 0x1000).unwrap(), 0);
        for n in 1..100 {
            table = table.with(RowId(n), IoRange::new(n * 8, 4).unwrap(), n);
        }
        let held: Vec<_> = table
            .candidates(0x104, 1)
            .map(|(_, r)| *r.device())
            .collect();
        assert_eq!(held, [0]);
        let held: Vec<_> = table
            .candidates(0x100, 4)
            .map(|(_, r)| *r.device())
            .collect();
        assert_eq!(held, [0, 0x20]);
    }
}
