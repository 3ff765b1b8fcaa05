// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages the destination does not have, or not as they are: runs of guest physical addresses, in order.

#![forbid(unsafe_code)]

use std::ops::Range;

use crate::migration::codec::PAGE;

/// Runs that one message has at most: 1 MiB.
pub const MOST_RUNS: usize = 1 << 16;

/// Runs that all messages together have at most: every other page of 128 GiB. A list of them takes 256 MiB here.
pub const MOST_ALL: usize = 1 << 24;

/// Runs of pages, of guest physical addresses: ascending, none touches the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing(Vec<Range<u64>>);

/// What comes is no list of pages behind those that came before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{:#x}..{:#x} is no run of whole pages behind {after:#x}", .run.start, .run.end)]
pub struct NoRun {
    /// What came.
    pub run: Range<u64>,
    /// Where the one before it ended.
    pub after: u64,
}

impl Missing {
    /// All of these, in whatever order and however often.
    pub fn of(mut runs: Vec<Range<u64>>) -> Self {
        runs.sort_unstable_by_key(|run| run.start);
        let mut all: Vec<Range<u64>> = Vec::new();
        for run in runs {
            match all.last_mut() {
                _ if run.is_empty() => {}
                Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                _ => all.push(run),
            }
        }
        Missing(all)
    }

    /// Takes what a message has, behind what came before; those that touch become one.
    ///
    /// # Errors
    /// [`NoRun`].
    pub fn extend(&mut self, runs: Vec<Range<u64>>) -> Result<(), NoRun> {
        for run in runs {
            let after = self.0.last().map_or(0, |last| last.end);
            let whole = |at: u64| at.is_multiple_of(PAGE as u64);
            if run.start < after || run.start >= run.end || !whole(run.start) || !whole(run.end) {
                return Err(NoRun { run, after });
            }
            match self.0.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => self.0.push(run),
            }
        }
        Ok(())
    }

    /// The runs.
    pub fn runs(&self) -> &[Range<u64>] {
        &self.0
    }

    /// Pages of 4 KiB.
    pub fn pages(&self) -> u64 {
        let bytes = self.0.iter().map(|run| run.end - run.start);
        bytes.sum::<u64>() / PAGE as u64
    }

    /// What of them is in `range`, with the ends moved outwards to multiples of `page`, which both ends of `range` are.
    pub fn within(&self, range: &Range<u64>, page: u64) -> Vec<Range<u64>> {
        let inside = self.0.iter().filter_map(|run| {
            let (start, end) = (run.start.max(range.start), run.end.min(range.end));
            (start < end).then(|| {
                let offset = |at: u64| at - range.start;
                let start = range.start + offset(start) / page * page;
                start..range.start + offset(end).next_multiple_of(page)
            })
        });
        Missing::of(inside.collect()).0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::reversed_empty_ranges)]

    use super::*;

    const P: u64 = PAGE as u64;

    #[test]
    fn runs_that_touch_or_overlap_are_one() {
        let missing = Missing::of(vec![8 * P..9 * P, 0..P, 4 * P..8 * P, 5 * P..6 * P, P..P]);
        assert_eq!(missing.runs(), [0..P, 4 * P..9 * P]);
        assert_eq!(missing.pages(), 6);
    }

    #[test]
    fn what_is_no_run_behind_the_last_is_refused_with_its_value() {
        let mut missing = Missing::default();
        missing.extend(vec![P..2 * P, 2 * P..3 * P]).unwrap();
        for run in [
            0..P,
            2 * P..4 * P,
            5 * P..5 * P,
            6 * P..5 * P,
            4 * P + 1..6 * P,
            4 * P..5 * P - 1,
        ] {
            let why = missing.clone().extend(vec![run.clone()]).unwrap_err();
            assert_eq!((why.run.clone(), why.after), (run, 3 * P));
            assert!(why.to_string().contains("behind 0x3000"), "{why}");
        }
        assert_eq!(missing.pages(), 2);
        assert_eq!(missing.runs(), vec![P..3 * P; 1]);
    }

    #[test]
    fn of_a_slot_of_large_pages_whole_ones_are_missing() {
        let missing = Missing::of(vec![0..P, 9 * P..10 * P, 17 * P..18 * P, 40 * P..41 * P]);
        let within = missing.within(&(8 * P..40 * P), 8 * P);
        assert_eq!(within, vec![8 * P..24 * P; 1]);
        assert_eq!(
            missing.within(&(8 * P..40 * P), P),
            [9 * P..10 * P, 17 * P..18 * P]
        );
    }
}
