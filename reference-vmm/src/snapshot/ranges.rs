// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sets of pages, and the section that says which pages an incremental snapshot has.
//!
//! The section `page-sources` of the file `state`:
//!
//! ```text
//!    0   4  number of runs, n: 0 to 4194304
//!    4   4  0
//!    8 16n  for each run, in order of address, with a page or more between two:
//!             0   8  guest physical address, a multiple of 4096
//!             8   8  length in bytes, a multiple of 4096, not 0
//! ```
//!
//! A page in a run is what the file `memory` beside has at its place, and zero where that has a hole. Every other page is
//! what it is in the parent. The runs lie in the regions of the section `memory`.

#![forbid(unsafe_code)]

use std::ops::Range;

use super::format::{u32_at, u64_at};
use super::pages::PAGE;

/// More runs there are not in a section: 64 MiB of them.
pub const MOST_RUNS: usize = 4 << 20;

/// Guest physical addresses, by the page: runs in order, with a page or more between two.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    runs: Vec<Range<u64>>,
}

/// Why bytes are no such section.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the section page-sources is none: {0}")]
pub struct RangesError(pub String);

impl Ranges {
    /// All of these, which may overlap and come in any order. What is no whole page is made one.
    pub fn of(runs: impl IntoIterator<Item = Range<u64>>) -> Self {
        let whole = |run: Range<u64>| {
            let end = run.end.checked_next_multiple_of(PAGE);
            run.start / PAGE * PAGE..end.unwrap_or(u64::MAX / PAGE * PAGE)
        };
        let runs = runs.into_iter().filter(|run| !run.is_empty()).map(whole);
        let mut sorted: Vec<_> = runs.collect();
        sorted.sort_unstable_by_key(|run| run.start);
        let mut ranges = Ranges::default();
        sorted.into_iter().for_each(|run| ranges.push(run));
        ranges
    }

    /// Behind the others, or touching the last.
    fn push(&mut self, run: Range<u64>) {
        match self.runs.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => self.runs.push(run),
        }
    }

    /// The runs, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs.iter().cloned()
    }

    /// How many runs there are.
    pub fn count(&self) -> usize {
        self.runs.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }

    /// What is in either.
    #[must_use]
    pub fn union(&self, other: &Ranges) -> Ranges {
        Ranges::of(self.iter().chain(other.iter()))
    }

    /// What is in this one and not in the other.
    #[must_use]
    pub fn subtract(&self, other: &Ranges) -> Ranges {
        let mut left = Ranges::default();
        let mut others = other.runs.iter().peekable();
        for run in &self.runs {
            let mut start = run.start;
            while others.next_if(|cut| cut.end <= run.start).is_some() {}
            while let Some(cut) = others.peek().filter(|cut| cut.start < run.end) {
                if cut.start > start {
                    left.runs.push(start..cut.start);
                }
                start = cut.end.min(run.end).max(start);
                match cut.end <= run.end {
                    true => drop(others.next()),
                    // It reaches into the next run.
                    false => break,
                }
            }
            if start < run.end {
                left.runs.push(start..run.end);
            }
        }
        left
    }

    /// What of `range` is in it, in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.runs.partition_point(|run| run.end <= range.start);
        let runs = self.runs.get(first..).unwrap_or_default().iter();
        let end = range.end;
        runs.take_while(move |run| run.start < end)
            .map(move |run| run.start.max(range.start)..run.end.min(range.end))
    }

    /// The same with at most `most` runs (1 at least): what lies between two that are near is taken in.
    #[must_use]
    pub fn thinned(&self, most: usize) -> Ranges {
        let mut gap = PAGE;
        let mut thin = self.clone();
        while thin.runs.len() > most.max(1) {
            let mut joined = Ranges::default();
            for run in thin.runs {
                match joined.runs.last_mut() {
                    Some(last) if run.start - last.end <= gap => last.end = run.end,
                    _ => joined.runs.push(run),
                }
            }
            thin = joined;
            gap = gap.saturating_mul(2);
        }
        thin
    }

    /// The section's bytes. It has at most [`MOST_RUNS`] runs ([`thinned`](Self::thinned)).
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(8 + 16 * self.runs.len());
        bytes.extend((self.runs.len() as u32).to_le_bytes());
        bytes.extend([0; 4]);
        for run in &self.runs {
            bytes.extend(run.start.to_le_bytes());
            bytes.extend((run.end - run.start).to_le_bytes());
        }
        bytes
    }

    /// Reads the section.
    ///
    /// # Errors
    /// [`RangesError`]: it is not one of these, with what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, RangesError> {
        let count = u32_at(bytes, 0) as usize;
        let rest = bytes.get(8..).unwrap_or_default();
        if bytes.len() < 8 || u32_at(bytes, 4) != 0 || count > MOST_RUNS || rest.len() != 16 * count
        {
            let has = bytes.len();
            return Err(RangesError(format!("{count} runs in {has} bytes")));
        }
        let mut runs: Vec<Range<u64>> = Vec::with_capacity(count);
        for entry in rest.chunks_exact(16) {
            let (start, len) = (u64_at(entry, 0), u64_at(entry, 8));
            let behind = runs.last().is_none_or(|last| last.end < start);
            let whole = start.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0;
            let end = start.checked_add(len).filter(|_| behind && whole);
            let Some(end) = end else {
                return Err(RangesError(format!(
                    "a run of {len} bytes at {start:#x}, which is no run of pages behind the one before"
                )));
            };
            runs.push(start..end);
        }
        Ok(Ranges { runs })
    }
}
