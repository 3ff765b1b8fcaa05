// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Recorder`]: takes pages in order of first touch, from any number of threads.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use memslots::Gfn;

use super::{MOST_PAGES, RecordError, WorkingSet};

/// An entry of the log is `millis << PAGE_BITS | page + 1`, so that 0 is one that is not written yet.
const PAGE_BITS: u32 = 40;
const MOST_MILLIS: u64 = (1 << (64 - PAGE_BITS)) - 1;

/// Notes which pages are touched first, and in which order. Shared by reference.
///
/// A touch is two atomic operations and a store, and of a page that is known one load; nothing blocks and nothing is
/// allocated. Memory is one bit for each page that is watched, and eight bytes for each that may be noted.
#[derive(Debug)]
pub struct Recorder {
    first: u64,
    pages: u64,
    snapshot: [u8; 16],
    began: Instant,
    /// A bit a page: somebody has touched it.
    seen: Box<[AtomicU64]>,
    log: Box<[AtomicU64]>,
    next: AtomicUsize,
    lost: AtomicU64,
}

impl Recorder {
    /// For `pages` pages from `first`; the first `most` that are touched are noted, further ones only counted. The clock
    /// starts now. `snapshot` is what the record will say that it belongs to.
    ///
    /// # Errors
    /// [`RecordError::Span`] of no page, or more than [`MOST_PAGES`], or beyond the last frame number.
    pub fn new(
        first: Gfn,
        pages: u64,
        most: usize,
        snapshot: [u8; 16],
    ) -> Result<Self, RecordError> {
        super::format::check_span(first.0, pages)?;
        const { assert!(MOST_PAGES < 1 << PAGE_BITS) };
        let most = most.min(pages as usize);
        let zeros = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect();
        Ok(Self {
            first: first.0,
            pages,
            snapshot,
            began: Instant::now(),
            seen: zeros(pages.div_ceil(64) as usize),
            log: zeros(most),
            next: AtomicUsize::new(0),
            lost: AtomicU64::new(0),
        })
    }

    /// Someone touched `gfn`, now. Says whether it was the first touch of a page that is watched.
    pub fn touch(&self, gfn: Gfn) -> bool {
        self.touch_at(gfn, self.began.elapsed())
    }

    /// Someone touched `gfn`, so long after the recording began. Times above 4.6 hours are noted as that.
    pub fn touch_at(&self, gfn: Gfn, after: Duration) -> bool {
        let Some(page) = gfn.0.checked_sub(self.first).filter(|at| *at < self.pages) else {
            return false;
        };
        let (word, bit) = ((page / 64) as usize, 1u64 << (page % 64));
        let Some(word) = self.seen.get(word) else {
            return false;
        };
        // Relaxed: the bit guards nothing but itself; of several threads the modification order picks one that finds it
        // clear, whatever each has seen. The load first keeps a page that is known from bouncing its cache line.
        if word.load(Ordering::Relaxed) & bit != 0
            || word.fetch_or(bit, Ordering::Relaxed) & bit != 0
        {
            return false;
        }
        // Relaxed: places are handed out once each; what is in a place is published by the store below. It cannot come
        // round: there are as many calls at most as there are pages.
        let place = self.next.fetch_add(1, Ordering::Relaxed);
        match self.log.get(place) {
            Some(entry) => {
                let millis = u64::try_from(after.as_millis()).unwrap_or(MOST_MILLIS);
                let entry_of = millis.min(MOST_MILLIS) << PAGE_BITS | (page + 1);
                // Relaxed: the entry is whole in itself, and who reads it (`so_far`, or `finish` with the recorder for
                // itself) depends on nothing else of this thread.
                entry.store(entry_of, Ordering::Relaxed);
            }
            None => {
                // Relaxed: a count.
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
        true
    }

    /// How many pages are noted.
    pub fn noted(&self) -> usize {
        // Relaxed: a count.
        self.next.load(Ordering::Relaxed).min(self.log.len())
    }

    /// What is recorded so far, while others go on. A touch that is under way ends it: those behind it are in the next
    /// answer. Allocates.
    pub fn so_far(&self) -> WorkingSet {
        let entries = self.log.iter().map(|entry| {
            // Relaxed: see the store.
            entry.load(Ordering::Relaxed)
        });
        let touches = entries.take_while(|entry| *entry != 0).map(|entry| {
            let page = (entry & ((1 << PAGE_BITS) - 1)) - 1;
            (self.first + page, entry >> PAGE_BITS)
        });
        // Relaxed: a count.
        let lost = self.lost.load(Ordering::Relaxed);
        WorkingSet::from_touches(Gfn(self.first), self.pages, self.snapshot, lost, touches)
    }

    /// The record. That nobody else has the recorder any more means that all touches are in it.
    pub fn finish(self) -> WorkingSet {
        self.so_far()
    }
}
