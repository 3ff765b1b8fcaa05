// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which page next, and who waits for it: the pager's head, without its hands.
//!
//! A [`Schedule`] never reads a page. Threads that see faults tell it, workers ask it what to read
//! and tell it how that went; it answers who is to be woken. It holds no lock and makes no call, so
//! that it is tested against a model; a pager puts it behind a mutex and reads outside of it.

use std::collections::{HashMap, VecDeque};

use memslots::{Gfn, MAX_PAGES, SlotExtent};

use crate::{Error, PageEvent, PageState};

/// Why a page is fetched, which decides when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Lane {
    /// Someone waits. Always before any prefetch.
    Fault,
    /// A guess.
    Prefetch,
}

/// One page to fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// The page.
    pub gfn: Gfn,
    /// The lane that it came from.
    pub lane: Lane,
    /// How often fetching it has failed before.
    pub failures: u32,
}

/// What a fault is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
#[non_exhaustive]
pub enum FaultAnswer {
    /// The waiter is kept. `fetch` says that this fault put a page in line (wake a worker); where
    /// it is false, the page was in the fault lane or being read already.
    Waiting {
        /// Whether a worker has something new to do.
        fetch: bool,
    },
    /// The page is here: nothing to wait for, the waiter was not kept.
    Present,
    /// The page will not come: the waiter was not kept.
    Poisoned,
}

/// How a fetch went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The page is in guest memory.
    Arrived,
    /// It failed; try again (later: the page goes to the end of the fault lane).
    Retry,
    /// It failed for good.
    GaveUp,
}

#[derive(Debug)]
struct Entry<W> {
    state: PageState,
    failures: u32,
    waiters: Vec<W>,
    /// Which place in the prefetch lane is this page's; others with its number are left over.
    ticket: u64,
}

/// The pages of one slot on their way into it. `W` is whatever is to be woken: a
/// [`Token`](crate::Token), a thread, a channel.
///
/// ```
/// use async_pf::{FaultAnswer, Lane, Outcome, Schedule};
/// use memslots::Gfn;
///
/// let mut pages = Schedule::new(Gfn(0x100), 16, 8)?;
/// pages.prefetch(Gfn(0x101))?;
/// pages.prefetch(Gfn(0x102))?;
/// assert_eq!(pages.fault(Gfn(0x105), "vcpu 0")?, FaultAnswer::Waiting { fetch: true });
/// assert_eq!(pages.fault(Gfn(0x105), "vcpu 1")?, FaultAnswer::Waiting { fetch: false });
///
/// let job = pages.start().unwrap(); // the fault overtakes both guesses
/// assert_eq!((job.gfn, job.lane), (Gfn(0x105), Lane::Fault));
/// assert_eq!(pages.finish(job.gfn, Outcome::Arrived)?, ["vcpu 0", "vcpu 1"]);
/// # Ok::<(), async_pf::Error>(())
/// ```
#[derive(Debug)]
pub struct Schedule<W> {
    first: u64,
    pages: u64,
    /// Pages that are neither absent nor final; the others cost two bits each.
    active: HashMap<u64, Entry<W>>,
    present: Bits,
    poisoned: Bits,
    faults: VecDeque<u64>,
    /// Pages with their tickets. May hold pages that have left the lane (promoted, forgotten, and
    /// perhaps come again with a new ticket); `start` passes over these.
    guesses: VecDeque<(u64, u64)>,
    tickets: u64,
    /// How many pages *are* `Prefetching`, and how many may be.
    guessed: usize,
    backlog: usize,
}

impl<W> Schedule<W> {
    /// A schedule for `pages` pages from `first`, all absent, with at most `backlog` guesses in
    /// line. Allocates two bits a page; pages beyond the last frame number are cut off.
    ///
    /// # Errors
    /// [`Error::TooManyPages`] of more than a slot can have ([`MAX_PAGES`]).
    pub fn new(first: Gfn, pages: u64, backlog: usize) -> Result<Self, Error> {
        let (pages, max) = (pages.min(u64::MAX - first.0), MAX_PAGES);
        if pages > max {
            return Err(Error::TooManyPages { pages, max });
        }
        Ok(Self {
            first: first.0,
            pages,
            active: HashMap::new(),
            present: Bits::new(pages),
            poisoned: Bits::new(pages),
            faults: VecDeque::new(),
            guesses: VecDeque::new(),
            tickets: 0,
            guessed: 0,
            backlog,
        })
    }

    /// A schedule for the pages of one slot.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn for_slot(slot: &SlotExtent, backlog: usize) -> Result<Self, Error> {
        Self::new(slot.first_gfn(), slot.pages(), backlog)
    }

    /// Where the page is.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn state(&self, gfn: Gfn) -> Result<PageState, Error> {
        let page = self.index(gfn)?;
        Ok(match self.active.get(&page) {
            Some(entry) => entry.state,
            None if self.present.get(page) => PageState::Present,
            None if self.poisoned.get(page) => PageState::Poisoned,
            None => PageState::Absent,
        })
    }

    /// Someone touched `gfn` and waits. A guess for the same page becomes a fault; a fetch under
    /// way is joined.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; the waiter is dropped with it.
    pub fn fault(&mut self, gfn: Gfn, waiter: W) -> Result<FaultAnswer, Error> {
        let (page, before, after) = self.step(gfn, PageEvent::Fault)?;
        match after {
            PageState::Present => return Ok(FaultAnswer::Present),
            PageState::Poisoned => return Ok(FaultAnswer::Poisoned),
            _ => {}
        }
        let fetch = after != before;
        if before == PageState::Prefetching {
            self.guessed -= 1;
        }
        if fetch {
            self.faults.push_back(page);
        }
        let entry = self.entry(page, after);
        entry.waiters.push(waiter);
        Ok(FaultAnswer::Waiting { fetch })
    }

    /// `gfn` will probably be wanted. Returns whether it was put in line: it is not where it is
    /// under way, here, or poisoned.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; [`Error::Backlog`] where the line is full.
    pub fn prefetch(&mut self, gfn: Gfn) -> Result<bool, Error> {
        let (page, before, after) = self.step(gfn, PageEvent::Prefetch)?;
        if before == after {
            return Ok(false);
        }
        if self.guessed >= self.backlog {
            return Err(Error::Backlog {
                bound: self.backlog,
            });
        }
        // Pages that left the lane are dropped from it before they outnumber its bound.
        if self.guesses.len() > self.backlog.saturating_mul(2) {
            let active = &self.active;
            self.guesses.retain(|(page, ticket)| {
                active.get(page).is_some_and(|entry| {
                    entry.state == PageState::Prefetching && entry.ticket == *ticket
                })
            });
        }
        self.guessed += 1;
        self.tickets += 1;
        let ticket = self.tickets;
        self.guesses.push_back((page, ticket));
        self.entry(page, after).ticket = ticket;
        Ok(true)
    }

    /// The next page to fetch, for the worker that asks: oldest fault first, then oldest guess.
    /// [`finish`](Self::finish) is owed.
    pub fn start(&mut self) -> Option<Job> {
        loop {
            let (page, ticket) = match self.faults.pop_front() {
                Some(page) => (page, None),
                None => self
                    .guesses
                    .pop_front()
                    .map(|(page, ticket)| (page, Some(ticket)))?,
            };
            let Some(entry) = self.active.get_mut(&page) else {
                continue; // it left the lane
            };
            let lane = match (ticket, entry.state) {
                (None, PageState::Wanted) => Lane::Fault,
                (Some(ticket), PageState::Prefetching) if ticket == entry.ticket => Lane::Prefetch,
                _ => continue, // as above
            };
            let Some(after) = entry.state.after(PageEvent::Start) else {
                continue;
            };
            entry.state = after;
            let failures = entry.failures;
            if lane == Lane::Prefetch {
                self.guessed -= 1;
            }
            return Some(Job {
                gfn: Gfn(self.first + page),
                lane,
                failures,
            });
        }
    }

    /// How the fetch of `gfn` went. Returns who is to be woken: everyone who waits, where the
    /// page has come or will not; no one on a retry. A guess that failed and that no one has come
    /// to wait for is forgotten.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; [`Error::Transition`] where no one is fetching the page.
    pub fn finish(&mut self, gfn: Gfn, outcome: Outcome) -> Result<Vec<W>, Error> {
        let page = self.index(gfn)?;
        let unwanted = self
            .active
            .get(&page)
            .is_some_and(|entry| entry.waiters.is_empty());
        let event = match outcome {
            Outcome::Arrived => PageEvent::Arrived,
            Outcome::GaveUp => PageEvent::GaveUp,
            Outcome::Retry if unwanted => PageEvent::Forget,
            Outcome::Retry => PageEvent::Retry,
        };
        let (_, before, after) = self.step(gfn, event)?;
        if before != PageState::Fetching {
            return Err(Error::Transition {
                gfn,
                state: before,
                event,
            });
        }
        match after {
            PageState::Present => self.present.set(page),
            PageState::Poisoned => self.poisoned.set(page),
            PageState::Wanted => {
                self.faults.push_back(page);
                let entry = self.entry(page, after);
                entry.failures = entry.failures.saturating_add(1);
                return Ok(Vec::new());
            }
            _ => {}
        }
        Ok(self
            .active
            .remove(&page)
            .map(|entry| entry.waiters)
            .unwrap_or_default())
    }

    /// Drops every waiter for which `gone` says so (its vCPU was reset). A page that no one waits
    /// for any more and that no worker has begun is forgotten.
    pub fn cancel(&mut self, mut gone: impl FnMut(&W) -> bool) {
        self.active.retain(|_, entry| {
            if entry.state == PageState::Prefetching {
                return true; // no one waits for a guess
            }
            entry.waiters.retain(|waiter| !gone(waiter));
            let idle = entry.state == PageState::Wanted && entry.waiters.is_empty();
            !(idle && entry.state.after(PageEvent::Forget) == Some(PageState::Absent))
        });
        let active = &self.active;
        self.faults.retain(|page| active.contains_key(page));
    }

    /// How many pages are here.
    pub fn present(&self) -> u64 {
        self.present.count
    }

    /// How many pages will not come.
    pub fn poisoned(&self) -> u64 {
        self.poisoned.count
    }

    /// How many pages are in line or being read.
    pub fn under_way(&self) -> usize {
        self.active.len()
    }

    /// Whether nothing is left to fetch: every page is here or will not come.
    pub fn is_complete(&self) -> bool {
        self.present.count + self.poisoned.count == self.pages
    }

    /// Asks the table; changes nothing.
    fn step(&self, gfn: Gfn, event: PageEvent) -> Result<(u64, PageState, PageState), Error> {
        let page = self.index(gfn)?;
        let state = self.state(gfn)?;
        match state.after(event) {
            Some(after) => Ok((page, state, after)),
            None => Err(Error::Transition { gfn, state, event }),
        }
    }

    fn entry(&mut self, page: u64, state: PageState) -> &mut Entry<W> {
        let entry = self.active.entry(page).or_insert_with(|| Entry {
            state,
            failures: 0,
            waiters: Vec::new(),
            ticket: 0,
        });
        entry.state = state;
        entry
    }

    fn index(&self, gfn: Gfn) -> Result<u64, Error> {
        match gfn.0.checked_sub(self.first) {
            Some(page) if page < self.pages => Ok(page),
            _ => Err(Error::OutOfRange {
                gfn,
                first: self.first,
                end: self.first + self.pages,
            }),
        }
    }
}

/// One bit a page, and how many are set.
#[derive(Debug)]
struct Bits {
    words: Vec<u64>,
    count: u64,
}

impl Bits {
    fn new(bits: u64) -> Self {
        Self {
            words: vec![0; bits.div_ceil(64) as usize],
            count: 0,
        }
    }

    fn get(&self, bit: u64) -> bool {
        self.words
            .get((bit / 64) as usize)
            .is_some_and(|word| word & (1 << (bit % 64)) != 0)
    }

    fn set(&mut self, bit: u64) {
        if let Some(word) = self.words.get_mut((bit / 64) as usize) {
            self.count += u64::from(*word & (1 << (bit % 64)) == 0);
            *word |= 1 << (bit % 64);
        }
    }
}
