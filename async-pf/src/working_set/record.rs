// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`WorkingSet`]: the record as plain data.

use std::time::Duration;

use memslots::Gfn;

/// Neighbouring pages that were touched one behind the other, ascending, within a millisecond.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// Its first page.
    pub first: Gfn,
    /// How many pages; never 0.
    pub pages: u64,
    /// When its first page was touched, since the recording began; whole milliseconds.
    pub after: Duration,
}

impl Run {
    /// One past its last page.
    pub(super) const fn end(&self) -> u64 {
        self.first.0.saturating_add(self.pages)
    }
}

/// The pages that a guest touched, in order of first touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    pub(super) first: Gfn,
    pub(super) pages: u64,
    pub(super) snapshot: [u8; 16],
    pub(super) lost: u64,
    /// Disjoint, within the span, times ascending.
    pub(super) runs: Vec<Run>,
}

impl WorkingSet {
    /// Of the touches, in their order: page, and milliseconds since the beginning. The caller sees to it that they are of
    /// the span, each once.
    pub(super) fn from_touches(
        first: Gfn,
        pages: u64,
        snapshot: [u8; 16],
        lost: u64,
        touches: impl IntoIterator<Item = (u64, u64)>,
    ) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        let mut latest = 0;
        for (gfn, millis) in touches {
            // Two threads may note their times the other way round than their places.
            latest = millis.max(latest);
            let after = Duration::from_millis(latest);
            match runs.last_mut() {
                Some(run) if run.end() == gfn && run.after == after => run.pages += 1,
                _ => runs.push(Run {
                    first: Gfn(gfn),
                    pages: 1,
                    after,
                }),
            }
        }
        Self {
            first,
            pages,
            snapshot,
            lost,
            runs,
        }
    }

    /// The first page of the memory that was watched.
    pub fn first(&self) -> Gfn {
        self.first
    }

    /// How many pages were watched.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The name of the snapshot that it belongs to, as whoever recorded it gave it.
    pub fn snapshot(&self) -> [u8; 16] {
        self.snapshot
    }

    /// How many pages were touched when the recorder was full, and are not in here.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// What was touched, in order of first touch. No page is in two of them.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// How many pages were touched.
    pub fn touched(&self) -> u64 {
        self.runs.iter().map(|run| run.pages).sum()
    }

    /// The pages in order of first touch.
    pub fn order(&self) -> impl Iterator<Item = Gfn> + '_ {
        let pages = |run: &Run| (run.first.0..run.end()).map(Gfn);
        self.runs.iter().flat_map(pages)
    }

    /// What of it was touched no later than so long after the recording began.
    pub fn until(&self, after: Duration) -> Self {
        let in_time = self.runs.iter().take_while(|run| run.after <= after);
        Self {
            runs: in_time.copied().collect(),
            ..self.clone()
        }
    }

    /// This record with what another of the same memory has beside it, behind it: the cheap way to keep one up to date
    /// whose guest has begun to use more.
    ///
    /// Its times go on from the last of this one. Pages of `later` outside of this one's span are left out.
    pub fn with_missed(&self, later: &Self) -> Self {
        let mut known = crate::intervals::Intervals::default();
        for run in &self.runs {
            known.insert(run.first.0..run.end());
        }
        let begin = self.runs.last().map_or(Duration::ZERO, |run| run.after);
        let mut all = self.clone();
        let span = self.first.0..self.first.0.saturating_add(self.pages);
        for run in &later.runs {
            let part = run.first.0.max(span.start)..run.end().min(span.end);
            known.missing(part, |part| {
                all.runs.push(Run {
                    first: Gfn(part.start),
                    pages: part.end - part.start,
                    after: begin.saturating_add(run.after),
                });
            });
        }
        all.lost = self.lost.saturating_add(later.lost);
        all
    }
}
