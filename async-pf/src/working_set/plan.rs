// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`ReplayPlan`]: what to read ahead, and in which order.
//!
//! The order of first touch is the right one to be in time, and the wrong one for a disk. So the record is cut into
//! batches in order of first touch, and within a batch the pages are sorted and neighbours read together:
//!
//! ```text
//!   touched   7 8 | 40 | 9 | 200 | 41     a batch of 4: 7 8 40 9       the next: 200 41
//!   read                                  7..10, 40                    41, 200
//! ```
//!
//! Few pages between two that are wanted are read with them, since that costs less than another read. No page is in two
//! reads.

use std::ops::Range;

use memslots::Gfn;

use super::WorkingSet;
use crate::intervals::Intervals;

/// How a plan is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanLimits {
    /// Pages of a batch, at least 1: how far the order of first touch may be left for the disk's sake.
    pub batch: u64,
    /// Pages that nobody wants and that are read for the sake of what is before and behind them, at most so many in a row.
    pub gap: u64,
    /// Pages of one read, at least 1: what a worker holds in its buffer.
    pub read: u64,
    /// Pages to leave out, so that [`Usage`](super::Usage) learns whether the record is still right.
    pub hold_out: HoldOut,
}

impl Default for PlanLimits {
    /// Batches of 16 MiB, reads of 1 MiB, gaps of 28 KiB, one page of 32 held out.
    fn default() -> Self {
        Self {
            batch: 4096,
            gap: 7,
            read: 256,
            hold_out: HoldOut::one_in(32, 0),
        }
    }
}

/// Which recorded pages are not read ahead, for a sample: who wants one faults, and so is seen. Chosen by the page's
/// number alone, so that whoever knows this value knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldOut {
    /// 0: none.
    one_in: u32,
    seed: u64,
}

impl HoldOut {
    /// None: everything is read ahead, and how much of it is used stays unknown.
    pub const NONE: Self = Self { one_in: 0, seed: 0 };

    /// About one page of `one_in`, others with each `seed`; none of 0.
    pub const fn one_in(one_in: u32, seed: u64) -> Self {
        Self { one_in, seed }
    }

    /// Whether the page is one of them.
    pub fn has(&self, gfn: Gfn) -> bool {
        if self.one_in == 0 {
            return false;
        }
        // SplitMix64's finisher: neighbours are chosen independently of each other.
        let mut mixed = gfn.0 ^ self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31).is_multiple_of(u64::from(self.one_in))
    }
}

/// One read ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Read {
    /// Its first page.
    pub first: Gfn,
    /// How many pages; never 0.
    pub pages: u64,
    /// How many of them are recorded; the others lie between.
    pub wanted: u64,
    /// The batch that it belongs to, from 0: reads of one batch may be done in any order.
    pub batch: u32,
}

impl Read {
    /// Its pages.
    pub fn range(&self) -> Range<u64> {
        self.first.0..self.first.0 + self.pages
    }
}

/// What to read ahead at a restore, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayPlan {
    reads: Vec<Read>,
    hold_out: HoldOut,
}

impl ReplayPlan {
    /// Of a record. Takes time in proportion to its pages, and memory to its runs.
    pub fn new(record: &WorkingSet, limits: PlanLimits) -> Self {
        let mut planner = Planner {
            limits: PlanLimits {
                batch: limits.batch.max(1),
                read: limits.read.max(1),
                ..limits
            },
            planned: Intervals::default(),
            batch: Vec::new(),
            fill: 0,
            number: 0,
            reads: Vec::new(),
        };
        for run in record.runs() {
            planner.add_run(run.first.0..run.end());
        }
        planner.flush();
        Self {
            reads: planner.reads,
            hold_out: limits.hold_out,
        }
    }

    /// The reads, in their order.
    pub fn reads(&self) -> &[Read] {
        &self.reads
    }

    /// The pages in the order in which they are read: what a scheduler's prefetch lane is fed with.
    pub fn pages(&self) -> impl Iterator<Item = Gfn> + '_ {
        self.reads.iter().flat_map(|read| read.range().map(Gfn))
    }

    /// How many pages are read.
    pub fn total(&self) -> u64 {
        self.reads.iter().map(|read| read.pages).sum()
    }

    /// What is not.
    pub fn hold_out(&self) -> HoldOut {
        self.hold_out
    }
}

struct Planner {
    limits: PlanLimits,
    /// What is in a read already, recorded or not.
    planned: Intervals,
    /// The batch that is being filled.
    batch: Vec<Range<u64>>,
    fill: u64,
    number: u32,
    reads: Vec<Read>,
}

impl Planner {
    fn add_run(&mut self, run: Range<u64>) {
        // Cut where a page is held out.
        let mut start = run.start;
        for gfn in run.clone() {
            if self.limits.hold_out.has(Gfn(gfn)) {
                self.add(start..gfn);
                start = gfn + 1;
            }
        }
        self.add(start..run.end);
    }

    /// Cuts where a batch is full.
    fn add(&mut self, mut range: Range<u64>) {
        while !range.is_empty() {
            let room = self.limits.batch - self.fill;
            let end = range.end.min(range.start.saturating_add(room));
            self.batch.push(range.start..end);
            self.fill += end - range.start;
            range.start = end;
            if self.fill == self.limits.batch {
                self.flush();
            }
        }
    }

    /// Makes reads of the batch.
    fn flush(&mut self) {
        let mut wanted: Vec<Range<u64>> = Vec::with_capacity(self.batch.len());
        for range in self.batch.drain(..) {
            // An earlier read may have gone over it.
            self.planned.missing(range, |part| wanted.push(part));
        }
        wanted.sort_unstable_by_key(|range| range.start);
        let from = self.reads.len();
        for range in wanted {
            self.extend_or_begin(range, from);
        }
        for read in self.reads.get(from..).unwrap_or_default() {
            self.planned.insert(read.range());
        }
        self.fill = 0;
        self.number = self.number.saturating_add(1);
    }

    fn extend_or_begin(&mut self, mut range: Range<u64>, from: usize) {
        let limits = self.limits;
        let batch = self.number;
        if let Some(last) = self.reads.get_mut(from..).and_then(|new| new.last_mut()) {
            let end = last.first.0 + last.pages;
            let gap = range.start - end;
            // What lies between must be read by no other, nor be held out: then it would not be seen.
            let clear = gap <= limits.gap
                && (end..range.start)
                    .all(|gfn| !self.planned.contains(gfn) && !limits.hold_out.has(Gfn(gfn)));
            if clear && last.pages + gap < limits.read {
                let room = limits.read - last.pages - gap;
                let more = room.min(range.end - range.start);
                last.pages += gap + more;
                last.wanted += more;
                range.start += more;
            }
        }
        while !range.is_empty() {
            let pages = (range.end - range.start).min(limits.read);
            self.reads.push(Read {
                first: Gfn(range.start),
                pages,
                wanted: pages,
                batch,
            });
            range.start += pages;
        }
    }
}
