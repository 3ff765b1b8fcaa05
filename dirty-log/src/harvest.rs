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

use crate::layout::{WORD_BITS, words_for};
use crate::source::{fits, part_after};
use crate::{DirtyBitmap, DirtySource, Error, PageRun, Runs};

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
    /// [`Error::SizeMismatch`] where the source covers another number of pages than the slot has;
    /// [`Error::Memory`].
    pub fn new(slot: SlotExtent, source: S) -> Result<Self, Error> {
        let pages = slot.pages();
        fits(pages, source.pages())?;
        Ok(Self {
            slot,
            source,
            pending: DirtyBitmap::new(pages)?,
        })
    }

    /// Collects from the source and opens a transaction over everything that is pending: what is
    /// new, and what earlier harvests did not commit.
    ///
    /// vCPUs may run: a page written after the call is in the next harvest, so copy *after* it. What
    /// it costs is the source's to say; of a large slot and a source that can forget by parts,
    /// [`parts`](Self::parts) is the better way while the guest runs.
    ///
    /// # Errors
    /// The source's. Nothing is lost: the next harvest has everything that this one would have had.
    pub fn harvest(&mut self) -> Result<Harvest<'_>, Error> {
        self.source.take(&mut self.pending)?;
        let part = PageRun {
            first: 0,
            pages: self.slot.pages(),
        };
        Ok(self.offer(part))
    }

    /// The same in parts of `pages` pages (rounded up to a multiple of 64): each is watched again
    /// right before it is handed out, so that a page that is written while earlier parts are being
    /// sent is sent once, and no call holds the VM's MMU lock for the whole slot.
    ///
    /// ```
    /// # use dirty_log::{DirtyLog, HostWrites};
    /// # use memslots::{Hva, SlotExtent, SlotId};
    /// # use vm_memory::{GuestAddress, bitmap::Bitmap};
    /// # let slot = unsafe { SlotExtent::new(SlotId(0), GuestAddress(0), 0x40_0000, Hva(0x1000)) }.unwrap();
    /// # let writes = HostWrites::new(1024)?;
    /// # let mut log = DirtyLog::new(slot, writes.clone())?;
    /// # writes.mark_dirty(0x3_f000, 0x2000);
    /// let mut parts = log.parts(64)?;
    /// let mut sent = 0;
    /// while let Some(part) = parts.next_part()? {
    ///     sent += part.count(); // copy part.runs()
    ///     part.commit();
    /// }
    /// assert_eq!(sent, 2); // page 63, and page 64 in the part behind it
    /// # Ok::<(), dirty_log::Error>(())
    /// ```
    ///
    /// # Errors
    /// The source's. Nothing is lost.
    pub fn parts(&mut self, pages: u64) -> Result<Parts<'_, S>, Error> {
        self.source.look(&mut self.pending)?;
        Ok(Parts {
            log: self,
            each: pages,
            done: 0,
        })
    }

    fn offer(&mut self, part: PageRun) -> Harvest<'_> {
        Harvest {
            slot: &self.slot,
            pending: &mut self.pending,
            part,
        }
    }

    /// What is pending already, without asking the source.
    pub fn pending(&self) -> &DirtyBitmap {
        &self.pending
    }

    /// Makes a run pending by hand: pages that were committed too early (the receiver lost them), or
    /// whose contents changed without a write (given back to the host).
    ///
    /// # Errors
    /// [`Error::OutOfRange`] where the run leaves the slot; nothing changes.
    pub fn mark(&mut self, run: PageRun) -> Result<(), Error> {
        self.pending.set(run)
    }

    /// The slot.
    pub fn slot(&self) -> &SlotExtent {
        &self.slot
    }

    /// The source, for instance to start or stop it.
    pub fn source_mut(&mut self) -> &mut S {
        &mut self.source
    }

    /// Ends the log: the source, and what was pending. What a round of parts noted and did not hand out is
    /// the source's still.
    pub fn into_parts(self) -> (S, DirtyBitmap) {
        (self.source, self.pending)
    }
}

/// A round over a slot, part by part. Made by [`DirtyLog::parts`]; dropping it half-way loses nothing.
#[derive(Debug)]
#[must_use = "parts are handed out by `next_part`"]
pub struct Parts<'a, S> {
    log: &'a mut DirtyLog<S>,
    each: u64,
    /// Pages before this one have been handed out.
    done: u64,
}

impl<S: DirtySource> Parts<'_, S> {
    /// The next part in which something is dirty; `None` at the slot's end.
    ///
    /// # Errors
    /// The source's, and nothing is lost: asked again, it tries the same part again.
    pub fn next_part(&mut self) -> Result<Option<Harvest<'_>>, Error> {
        while let Some(part) = part_after(self.done, self.each, self.log.slot.pages()) {
            self.log.source.take_part(part, &mut self.log.pending)?;
            self.done = part.end();
            if self.log.pending.runs_in(part).next().is_some() {
                return Ok(Some(self.log.offer(part)));
            }
        }
        Ok(None)
    }
}

/// Pages that became dirty, on offer. [`commit`](Self::commit) forgets them; dropping the harvest
/// puts every bit back into the log.
#[derive(Debug)]
#[must_use = "a harvest that is dropped puts every bit back"]
pub struct Harvest<'a> {
    slot: &'a SlotExtent,
    pending: &'a mut DirtyBitmap,
    /// What is on offer: whole words, but at the slot's end.
    part: PageRun,
}

impl Harvest<'_> {
    /// The dirty pages, as ascending runs counted from the slot's start.
    pub fn runs(&self) -> Runs<'_> {
        self.pending.runs_in(self.part)
    }

    /// The same as guest frame numbers.
    pub fn gfns(&self) -> impl Iterator<Item = Range<Gfn>> + '_ {
        let first = self.slot.first_gfn().0;
        self.runs().map(move |run| {
            Gfn(first.saturating_add(run.first))..Gfn(first.saturating_add(run.end()))
        })
    }

    /// Which pages of the slot it is about: all, or a part of [`DirtyLog::parts`].
    pub const fn range(&self) -> PageRun {
        self.part
    }

    /// The bits of the whole slot, for a consumer that merges several slots or several harvests. Of a
    /// part, what lies outside [`range`](Self::range) is not on offer: it may not be watched yet.
    pub fn bitmap(&self) -> &DirtyBitmap {
        self.pending
    }

    /// How many pages are dirty.
    pub fn count(&self) -> u64 {
        self.pending.count_in(self.part)
    }

    /// Forgets one run that has been dealt with; the rest stays on offer.
    ///
    /// For a copier that may fail half-way: what it sent is not sent again.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] where the run leaves what is on offer; nothing is forgotten.
    pub fn forget(&mut self, run: PageRun) -> Result<(), Error> {
        if run.first < self.part.first || run.end() > self.part.end() {
            return Err(Error::OutOfRange {
                first: run.first,
                count: run.pages,
                pages: self.part.end(),
            });
        }
        self.pending.clear(run)
    }

    /// Forgets all of it: the pages' contents are safe elsewhere.
    pub fn commit(self) {
        let first = (self.part.first / WORD_BITS) as usize;
        if let Some(words) = self
            .pending
            .words_mut()
            .get_mut(first..words_for(self.part.end()))
        {
            words.fill(0);
        }
    }
}
