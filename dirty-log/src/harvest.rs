// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The log of one slot, and the harvest: a transaction over what became dirty.
//!
//! Reading KVM's log is destructive: the kernel forgets what it hands out. A VMM that then fails
//! to send those pages (a full disk, a severed wire) has lost writes unless it keeps them by hand.
//! Here the bits go from the source into the log's *pending* set first, and leave that set only by
//! [`Harvest::commit`] or [`Harvest::forget`]: dropping a harvest is putting every bit back, and
//! costs nothing.
//!
//! ```text
//!   guest, VMM, devices ──write──▶ sources ──take──▶ pending ──runs──▶ your copier
//!                                                      ▲   │
//!                                          drop, error └───┤ commit, forget(run)
//!                                                          ▼
//!                                                         gone
//! ```

use std::ops::Range;

use memslots::{Gfn, SlotExtent};

use crate::{DirtyBitmap, Error, PageRun, Runs};

/// Something that knows which pages of one slot were written since it was last asked.
///
/// # Contract
/// [`take`](Self::take) *moves* bits: what it adds to `into` it no longer holds, and what it keeps
/// it will hand out next time. On an error every bit must be in one of the two places; where the
/// source cannot know (the kernel took bits and lost them on the way), it adds all pages. The bits
/// it adds to were there before and stay.
pub trait DirtySource {
    /// How many pages this source covers; constant.
    fn pages(&self) -> u64;

    /// Moves what became dirty into `into`, which covers [`pages`](Self::pages) pages.
    ///
    /// # Errors
    /// The source's own; no bit is lost by it.
    fn take(&mut self, into: &mut DirtyBitmap) -> Result<(), Error>;
}

/// Two writers, one view: for instance KVM's bitmap and [`HostWrites`](crate::HostWrites).
///
/// If the second fails, what the first gave is in the bitmap already and stays there.
impl<A: DirtySource, B: DirtySource> DirtySource for (A, B) {
    /// The first source's; [`take`](DirtySource::take) fails where the second differs.
    fn pages(&self) -> u64 {
        self.0.pages()
    }

    fn take(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        if self.1.pages() != self.0.pages() {
            return Err(Error::SizeMismatch {
                want: self.0.pages(),
                got: self.1.pages(),
            });
        }
        self.0.take(into)?;
        self.1.take(into)
    }
}

/// What is dirty in one slot, over all of its writers, until someone commits to having dealt with
/// it.
#[derive(Debug)]
pub struct DirtyLog<S> {
    slot: SlotExtent,
    source: S,
    /// Taken from the source and not yet committed.
    pending: DirtyBitmap,
}

impl<S: DirtySource> DirtyLog<S> {
    /// A log for `slot`, fed by `source`. Allocates the slot's bitmap: the last allocation.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] where the source covers another number of pages than the slot has.
    pub fn new(slot: SlotExtent, source: S) -> Result<Self, Error> {
        let pages = slot.pages();
        if source.pages() != pages {
            return Err(Error::SizeMismatch {
                want: pages,
                got: source.pages(),
            });
        }
        Ok(Self {
            slot,
            source,
            pending: DirtyBitmap::new(pages),
        })
    }

    /// Collects from the source and opens a transaction over everything that is pending: what is
    /// new, and what earlier harvests did not commit.
    ///
    /// With KVM's bitmap this is one ioctl; it write-protects the slot's pages again and takes the
    /// VM's MMU lock meanwhile. vCPUs may run: a page written after the call is in the next
    /// harvest, so copy *after* it.
    ///
    /// # Errors
    /// The source's. Nothing is lost: the next harvest has everything that this one would have had.
    pub fn harvest(&mut self) -> Result<Harvest<'_>, Error> {
        self.source.take(&mut self.pending)?;
        Ok(Harvest {
            slot: &self.slot,
            pending: &mut self.pending,
        })
    }

    /// What is pending already, without asking the source.
    pub fn pending(&self) -> &DirtyBitmap {
        &self.pending
    }

    /// The slot.
    pub fn slot(&self) -> &SlotExtent {
        &self.slot
    }

    /// The source, for instance to start or stop it.
    pub fn source_mut(&mut self) -> &mut S {
        &mut self.source
    }
}

/// Pages that became dirty, on offer. [`commit`](Self::commit) forgets them; dropping the harvest
/// puts every bit back into the log.
#[derive(Debug)]
#[must_use = "a harvest that is dropped puts every bit back"]
pub struct Harvest<'a> {
    slot: &'a SlotExtent,
    pending: &'a mut DirtyBitmap,
}

impl Harvest<'_> {
    /// The dirty pages, as ascending runs counted from the slot's start.
    pub fn runs(&self) -> Runs<'_> {
        self.pending.runs()
    }

    /// The same as guest frame numbers.
    pub fn gfns(&self) -> impl Iterator<Item = Range<Gfn>> + '_ {
        let first = self.slot.first_gfn().0;
        self.runs().map(move |run| {
            Gfn(first.saturating_add(run.first))..Gfn(first.saturating_add(run.end()))
        })
    }

    /// The bits, for a consumer that merges several slots or several harvests.
    pub fn bitmap(&self) -> &DirtyBitmap {
        self.pending
    }

    /// How many pages are dirty.
    pub fn count(&self) -> u64 {
        self.pending.count()
    }

    /// Forgets one run that has been dealt with; the rest stays on offer.
    ///
    /// For a copier that may fail half-way: what it sent is not sent again.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] where the run leaves the slot; nothing is forgotten.
    pub fn forget(&mut self, run: PageRun) -> Result<(), Error> {
        self.pending.clear(run)
    }

    /// Forgets all of it: the pages' contents are safe elsewhere.
    pub fn commit(self) {
        self.pending.clear_all();
    }
}
