// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pager: threads that serve the page faults of registered memory from [`PageSource`]s.
//!
//! ```text
//!               messages            ┌───────── book (one mutex) ─────────┐
//!   userfaultfd ────────▶ a worker ─▶ where each page is, who waits,      │
//!        ▲                   │      │ faults before guesses before rest   │
//!        │ copy, zero,       │ job  └─────────▲──────────────────────────┘
//!        │ poison, wake      ▼                │ late, due again
//!        └────────────── PageSource        guard (the clock)
//! ```
//!
//! [`Pager::start`] takes the [`FillRole`] of registrations ([`PagedSlot`]) and serves them until it is
//! [finished](Pager::finish) or dropped. It is started before any vCPU or VM state is set, for some of those calls touch
//! memory (see [who may block on whom](memslots::uffd#who-may-block-on-whom)).
//!
//! # Example
//! Memory whose contents come when they are touched:
//! ```
//! use async_pf::pager::{PagedSlot, Pager, PagerConfig};
//! use async_pf::{FilePiece, FileSource};
//! use memslots::uffd::{Features, Modes, OpenError, Uffd};
//! use memslots::{Backing, Gfn, Mapping};
//! use std::io::Write;
//! use std::sync::Arc;
//! use std::time::Duration;
//! use vm_memory::GuestAddress;
//!
//! let mut file = tempfile::tempfile()?;
//! file.write_all(&[7; 0x4000])?;
//! let source = FileSource::new(file, [FilePiece { first: Gfn(0), pages: 4, offset: 0 }])?;
//!
//! let uffd = match Uffd::open(Features::POISON, Features::EVENT_REMOVE) {
//!     Err(OpenError::Denied { .. } | OpenError::Missing { .. }) => return Ok(()),
//!     opened => opened?,
//! };
//! let memory = Arc::new(Mapping::new(&Backing::anonymous(0x4000), GuestAddress(0))?);
//! let registration = uffd.register_all(&memory, Modes::MISSING)?;
//! let slot = PagedSlot::new(&registration, Gfn(0), Arc::new(source))?;
//! let pager = Pager::start(&uffd, vec![slot], PagerConfig::default())?;
//!
//! // A vCPU's access, or anybody's.
//! // SAFETY: mapped for as long as this runs; a guest's memory is read volatile.
//! assert_eq!(unsafe { (memory.host().0 as *const u8).read_volatile() }, 7);
//!
//! pager.prefetch_rest();
//! assert!(pager.wait(Duration::from_secs(60)));
//! // Not by `?`: the error has the pager, and to drop it poisons what is missing.
//! let roles = match pager.finish() {
//!     Ok(roles) => roles, // everything is there
//!     Err(unfinished) => panic!("{unfinished}, and were waited for"),
//! };
//! # drop(roles);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it promises
//! * Who touches a page goes on: with its contents; or, at the [deadline](PagerConfig::deadline) at the latest (and some
//!   milliseconds), with what [`GiveUp`] says. A source that blocks for ever holds a worker, and nobody else: another
//!   thread reads the messages and keeps the deadline.
//! * Two faults on a page are one fetch. A fault is served before anything that nobody waits for; where it is on a page that is
//!   under way among that, and its source lets faults [overtake](PageSource::overtakes), it is fetched once more, in front (by
//!   another worker: of one alone it is waited for). The first that comes is placed, and the other dropped.
//! * What was given back (`MADV_DONTNEED`, a balloon, an unplug) reads as zeros, and is not brought again, be it under way
//!   at that moment or not. This takes a userfaultfd with [`Features::EVENT_REMOVE`]; without, what is given back before it
//!   was brought comes from the source.
//! * A [`ProtectRole`](memslots::uffd::ProtectRole) of the same registration may be at work: pages come protected, and
//!   write-protect faults go to [`PagerEvents::write_protected`].
//! * What panics in a source or in [`PagerEvents`] costs the page or the call that it was about, and no thread: where panics
//!   unwind. With `panic = "abort"` (a profile's choice) any panic ends the process.
//! * Dropped before everything is there, it poisons what is missing ([`GiveUp::Poison`]): nobody hangs, and nobody reads
//!   zeros in place of what should have come.
//!
//! # Costs
//! A byte a page, a buffer for each worker, no allocation for a fault. A fault in steady state is four system calls (poll,
//! read, the source's, the copy), as many as a loop without bookkeeping has, on one thread; of more workers than one two
//! wait for messages, and each message wakes both, as it does a loop on two threads. The guard looks every 2 ms while there
//! is something to do, and sleeps else. `cargo bench -p async-pf --bench pager` compares.

mod book;
mod config;
mod error;
mod place;
mod shared;
mod stats;
mod window;
mod worker;

pub use config::{GiveUp, Lost, LostReason, PagerConfig, PagerEvents, Spawn};
pub use error::{FinishError, PrefetchError, StartError};
pub use stats::{Histogram, Stats};

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use memslots::uffd::{Features, FillRole, ForeignRange, Modes, Registration, Uffd};
use memslots::{Errno, Gfn, PAGE_SIZE};

use crate::{PageSource, sync};
use shared::{Shared, SlotInfo};
use worker::Living;

/// A registration whose pages a pager brings, and where from.
pub struct PagedSlot {
    info: SlotInfo,
    role: FillRole,
}

impl PagedSlot {
    /// Borrows the registration's fill role. Its first byte is in the guest's page `first`, and its source is asked for
    /// pages by that count. Its pages may be larger than 4 KiB (hugetlb): then the source is asked for as many of 4 KiB as
    /// they have.
    ///
    /// A registration of [`Modes::MINOR`] alone is not fetched: its pages are mapped from the page cache, where someone
    /// puts them before they are touched.
    ///
    /// # Errors
    /// [`StartError::Lend`], [`StartError::Wraps`].
    pub fn new(
        registration: &Registration,
        first: Gfn,
        source: Arc<dyn PageSource>,
    ) -> Result<Self, StartError> {
        let role = registration.lend_fill()?;
        let missing = registration.modes().contains(Modes::MISSING);
        Self::of(role, registration.host_range(), first, source, missing)
    }

    /// As [`new`](Self::new), of another process's memory: nobody protects pages there, and addresses that
    /// [events](PagerEvents) tell of are that process's.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn foreign(
        range: &ForeignRange,
        first: Gfn,
        source: Arc<dyn PageSource>,
    ) -> Result<Self, StartError> {
        let role = range.lend_fill()?;
        let missing = range.modes().contains(Modes::MISSING);
        Self::of(role, range.host_range(), first, source, missing)
    }

    /// Of these pages alone: all others are there already, or are zeros. One of those that is touched and not there is
    /// served as zeros, without the source. What is not the slot's is passed over, and a page of the registration's size
    /// comes if any of its 4 KiB is to.
    #[must_use]
    pub fn only(mut self, pages: impl IntoIterator<Item = Range<Gfn>>) -> Self {
        let (each, first) = (self.info.page_size / PAGE_SIZE, self.info.first.0);
        let end = first + self.info.pages() * each;
        let within = pages.into_iter().map(|run| {
            let (start, stop) = (run.start.0.max(first), run.end.0.min(end));
            (start.max(first) - first) / each..stop.saturating_sub(first).div_ceil(each)
        });
        self.info.only = Some(within.filter(|run| run.start < run.end).collect());
        self
    }

    fn of(
        role: FillRole,
        host: Range<usize>,
        first: Gfn,
        source: Arc<dyn PageSource>,
        missing: bool,
    ) -> Result<Self, StartError> {
        let info = SlotInfo {
            host,
            page_size: role.page_size(),
            first,
            source,
            missing,
            ahead: 1,
            only: None,
        };
        let pages = info.pages();
        match first.0.checked_add(role.size() / PAGE_SIZE) {
            Some(_) => Ok(Self { info, role }),
            None => Err(StartError::Wraps {
                first,
                pages,
                page_size: info.page_size,
            }),
        }
    }
}

impl fmt::Debug for PagedSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagedSlot")
            .field("role", &self.role)
            .field("first", &self.info.first)
            .finish_non_exhaustive()
    }
}

/// How far a pager has come. Pages are of their registration's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// All pages.
    pub total: u64,
    /// Those that have to come still.
    pub missing: u64,
    /// Those that will not come.
    pub lost: u64,
    /// Why the pager has ended by itself, if it has.
    pub failed: Option<Errno>,
}

/// Serves page faults. [The module](self) says how and what it promises.
pub struct Pager {
    shared: Arc<Shared>,
}

impl Pager {
    /// Starts the threads. `uffd` is the one that the slots are registered with, and nobody else reads its messages.
    ///
    /// # Errors
    /// [`StartError`]; then no thread is left, and the roles are given back.
    pub fn start(
        uffd: &Uffd,
        slots: Vec<PagedSlot>,
        config: PagerConfig,
    ) -> Result<Self, StartError> {
        let config = config.bounded();
        let (workers, spawn) = (config.workers, Arc::clone(&config.spawn));
        let pager = Self::without_threads(uffd, slots, config)?;
        let run = |name: String, run: fn(&Shared)| {
            pager.shared.lock().alive += 1;
            let living = Living(Arc::clone(&pager.shared));
            let run = Box::new(move || {
                living.begin();
                run(&living.0);
            });
            spawn(name.clone(), run).map_err(|source| StartError::Thread { name, source })
        };
        let started = run("pager-guard".into(), Shared::guard)
            .and_then(|()| {
                (0..workers).try_for_each(|worker| run(format!("pager-{worker}"), Shared::work))
            })
            .and_then(|()| pager.shared.promise(workers + 1));
        if let Err(error) = started {
            // Nothing was promised yet: what is missing is the next pager's.
            pager.end();
            return Err(error);
        }
        Ok(pager)
    }

    /// Poisons all pages of these slots that are missing, or [those alone](PagedSlot::only) that are to come, and wakes who waits for one:
    /// what a pager does when it is dropped, by this thread. Another process may have the userfaultfd: no message is read, unless it
    /// has events and memory is being changed, which waits for that.
    ///
    /// # Errors
    /// [`StartError::NoSlot`], [`StartError::NoPoison`], [`StartError::Pipe`]: nothing is poisoned.
    pub fn poison(uffd: &Uffd, slots: Vec<PagedSlot>) -> Result<(), StartError> {
        Self::without_threads(uffd, slots, PagerConfig::default()).map(drop)
    }

    /// One that serves nothing; dropped, it gives up what is missing.
    fn without_threads(
        uffd: &Uffd,
        slots: Vec<PagedSlot>,
        config: PagerConfig,
    ) -> Result<Self, StartError> {
        if slots.is_empty() {
            return Err(StartError::NoSlot);
        }
        let feature = Features::POISON;
        if config.give_up == GiveUp::Poison && !uffd.available().contains(feature) {
            return Err(StartError::NoPoison { feature });
        }
        let slots = slots.into_iter().map(|PagedSlot { mut info, role }| {
            info.ahead = (config.ahead / info.page_size).max(1);
            (info, role)
        });
        let shared = Shared::new(uffd.clone(), slots.collect(), config);
        Ok(Self {
            shared: Arc::new(shared.map_err(StartError::Pipe)?),
        })
    }

    /// Brings these pages of a slot before anyone touches them, behind all faults and the guesses before them. What is
    /// there or under way is passed over; what fails is forgotten. Blocks for nothing.
    ///
    /// # Errors
    /// [`PrefetchError`].
    pub fn prefetch(&self, slot: usize, gfns: Range<Gfn>) -> Result<(), PrefetchError> {
        let slots = self.shared.slots.len();
        let Some(info) = self.shared.slots.get(slot) else {
            return Err(PrefetchError::NoSlot { slot, slots });
        };
        let each = info.page_size / PAGE_SIZE;
        let (gfns, first) = (gfns.start.0..gfns.end.0, info.first.0);
        let of = first..first + info.pages() * each;
        if gfns.start < of.start || gfns.end > of.end || gfns.start > gfns.end {
            return Err(PrefetchError::OutOfRange { gfns, of });
        }
        let pages = (gfns.start - first) / each..(gfns.end - first).div_ceil(each);
        if pages.is_empty() {
            return Ok(());
        }
        let mut state = self.shared.lock();
        if !state.book.guess(slot, pages) {
            return Err(PrefetchError::Backlog {
                bound: self.shared.config.backlog,
            });
        }
        self.shared.rouse(&mut state);
        Ok(())
    }

    /// Brings everything, slot after slot, while nothing else is to be done. One worker does that
    /// ([or several](PagerConfig::workers)), a piece ([`PagerConfig::ahead`]) at a time, and serves what faults in between; a
    /// page that does not come is given up as if someone waited for it. Blocks for nothing; once is enough.
    pub fn prefetch_rest(&self) {
        let mut state = self.shared.lock();
        state.book.want_rest();
        self.shared.rouse(&mut state);
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        let state = self.shared.lock();
        let (missing, lost, total) = state.book.totals();
        Progress {
            total,
            missing,
            lost,
            failed: state.failed,
        }
    }

    /// Waits until every page is there, lost or given back, for this long at most, and says whether they are. Without
    /// [`prefetch_rest`](Self::prefetch_rest), only what is touched comes. Ends early when the pager does, and says no then.
    pub fn wait(&self, limit: Duration) -> bool {
        let until = sync::now().checked_add(limit);
        let mut state = self.shared.lock();
        loop {
            // What was given up in its end counts as settled, and has not come.
            if state.abandoned {
                return false;
            }
            if state.book.is_complete() {
                return true;
            }
            if state.stop {
                return false;
            }
            let left = until.map_or(limit, |until| until.saturating_duration_since(sync::now()));
            if left.is_zero() {
                return false;
            }
            state = self.shared.wait_for(&self.shared.done, state, left);
        }
    }

    /// What it has done. Takes its lock for as long as a copy of some hundred bytes takes.
    pub fn stats(&self) -> Stats {
        self.shared.lock().book.stats
    }

    /// Ends it, when every page is there, lost or given back, and hands the fill roles back, in the order of the slots.
    /// What is given back from then on, or was and is touched later, faults to whoever reads the userfaultfd's messages
    /// then: a balloon needs one who does ([`FillRole::zero`]), or the pager simply stays.
    ///
    /// # Errors
    /// [`FinishError`], with the pager, which goes on: pages are missing. **Not for `?`:** where the error is dropped, so is the
    /// pager, and that poisons what is missing ([`GiveUp::Poison`]). Keep it, or finish behind a [`wait`](Self::wait) that says yes:
    ///
    /// ```
    /// # use async_pf::pager::Pager;
    /// # use memslots::uffd::FillRole;
    /// # use std::time::Duration;
    /// fn finish_at_last(mut pager: Pager) -> Option<Vec<FillRole>> {
    ///     loop {
    ///         pager = match pager.finish() {
    ///             Ok(roles) => return Some(roles),
    ///             Err(unfinished) => unfinished.pager, // it has gone on all the time
    ///         };
    ///         pager.prefetch_rest();
    ///         if !pager.wait(Duration::from_secs(1)) && pager.progress().failed.is_some() {
    ///             return None; // it has ended by itself
    ///         }
    ///     }
    /// }
    /// ```
    pub fn finish(self) -> Result<Vec<FillRole>, Box<FinishError>> {
        let (missing, ..) = self.shared.lock().book.totals();
        if missing > 0 {
            return Err(Box::new(FinishError {
                pager: self,
                missing,
            }));
        }
        Ok(self.end())
    }

    /// Ends it for all who share it, as its drop does for one: see there. Out of a call of [`PagerEvents`] too, or of a
    /// source's [`fetch`](PageSource::fetch).
    pub fn close(&self) {
        self.shared.stop();
        self.shared.abandon();
        drop(self.end());
    }

    /// Ends the threads and takes the roles.
    fn end(&self) -> Vec<FillRole> {
        self.shared.stop();
        let mut roles = self.shared.roles_alone();
        // A fault whose message was read is told again to whoever comes next.
        self.shared.wake_all(&roles);
        std::mem::take(&mut *roles)
    }
}

impl Drop for Pager {
    /// Ends the threads; a worker inside its source is not waited for, and ends when that answers. What is missing is
    /// poisoned, or left to whoever fills next ([`GiveUp`]). On a thread of the pager's own, inside a call of
    /// [`PagerEvents`] or of a source, that thread ends when the call returns.
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for Pager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pager")
            .field("progress", &self.progress())
            .finish_non_exhaustive()
    }
}
