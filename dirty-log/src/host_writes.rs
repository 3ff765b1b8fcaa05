// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VMM's own writes into guest memory, which KVM does not see.
//!
//! KVM logs what the guest writes, and what the kernel writes for it. A virtio device that fills a
//! buffer from user space goes past both. vm-memory calls a region's `Bitmap` after each of its
//! writes; [`HostWrites`] is one, and a [`DirtySource`] at its other end.
//!
//! # Ordering
//! The writer stores the data and *then* sets the bit, with `Release`; the harvester takes the bits
//! with `Acquire` and *then* reads the data. A bit taken therefore comes with the data that it
//! stands for, and data whose bit was not yet set is in the next harvest. `tests/loom_host_writes`
//! is the model. It is tempting to skip the read-modify-write where the bit is already set; that
//! needs a full fence between the data and the look at the bit (the store may still sit in the
//! store buffer when the harvester takes the bit and copies the page), which costs what it saves.
//!
//! It is turned on and off while devices write: `switch.rs` says how that loses no write.

use std::fmt;
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

use crate::barrier::Process;
use crate::layout::{PAGE_SIZE, for_each_word, words};
use crate::source::fits;
use crate::switch::Switch;
use crate::sync::{AtomicU64, Ordering};
use crate::{DirtyBitmap, DirtySource, Error, PageRun};

/// An atomic bitmap of the pages that this process wrote, shared by clones.
///
/// One that a region makes for itself is **off**, and logs nothing until [`start`](Self::start): each region of
/// a `GuestMemoryMmap<HostWrites>` that is made in the usual way, by [`NewBitmap`]. [`new`](Self::new) and
/// `default` make one that is on.
///
/// Give one clone to the memory region (`GuestRegionMmap<HostWrites>`), and another to a
/// [`DirtyLog`](crate::DirtyLog). Any number of threads mark; one harvests. It is turned on and off
/// while they do ([`start`](Self::start), [`stop`](Self::stop)).
///
/// ```
/// use dirty_log::{DirtyBitmap, DirtySource, HostWrites, PageRun};
/// use vm_memory::bitmap::Bitmap;
///
/// let mut writes = HostWrites::new(512)?;
/// writes.clone().mark_dirty(0x1ffe, 4); // what vm-memory does after a write at 0x1ffe
///
/// let mut dirty = DirtyBitmap::new(512)?;
/// writes.take(&mut dirty)?;
/// assert_eq!(dirty.runs().next(), Some(PageRun { first: 1, pages: 2 }));
/// # Ok::<(), dirty_log::Error>(())
/// ```
#[derive(Clone)]
pub struct HostWrites(Arc<Inner>);

struct Inner {
    switch: Switch,
    /// Made when the log is first on.
    words: OnceLock<Box<[AtomicU64]>>,
    pages: u64,
}

impl HostWrites {
    /// A clean log for `pages` pages that is on.
    ///
    /// # Errors
    /// [`Error::Memory`] where the host has no memory for the bitmap.
    pub fn new(pages: u64) -> Result<Self, Error> {
        let log = Self::with_switch(pages, Switch::on(Process));
        log.0.make_words()?;
        Ok(log)
    }

    /// A log for `pages` pages that is off: [`start`](Self::start) turns it on. Takes no memory until
    /// then.
    pub fn off(pages: u64) -> Self {
        Self::with_switch(pages, Switch::off(Process))
    }

    fn with_switch(pages: u64, switch: Switch) -> Self {
        Self(Arc::new(Inner {
            switch,
            words: OnceLock::new(),
            pages,
        }))
    }

    /// Turns the log on, for all clones. When it returns, each write whose data are not yet visible to
    /// the caller will be marked: copy what was there before *after* this call. One that is on stays
    /// so. Allocates the bitmap the first time; interrupts this process's running threads for some
    /// microseconds (`membarrier(2)`); waits for another thread's `start` or [`stop`](Self::stop).
    ///
    /// # Errors
    /// [`Error::Memory`] where the host has no memory for the bitmap. [`Error::Barrier`] where the kernel
    /// refuses a `membarrier` that it granted before (a seccomp filter that came later). The log is off
    /// then, as it was, and each later call fails until there is what was missing; what was written
    /// meanwhile may be marked.
    pub fn start(&self) -> Result<(), Error> {
        self.0.make_words()?;
        self.0.switch.start()
    }

    /// Turns the log off, for all clones. What is marked stays until it is taken, and writers that are
    /// in the middle of a write may mark it still. Waits for another thread's [`start`](Self::start).
    pub fn stop(&self) {
        self.0.switch.stop();
    }

    /// Whether it is on: already while a [`start`](Self::start) is under way, which may fail yet.
    pub fn is_on(&self) -> bool {
        self.0.switch.peek()
    }
}

impl Inner {
    fn make_words(&self) -> Result<(), Error> {
        if self.words.get().is_none() {
            let made = words(self.pages, || AtomicU64::new(0))?;
            // Who made them at the same time made the same; the second ones are given back.
            self.words.get_or_init(|| made);
        }
        Ok(())
    }

    /// Marks the pages of `len` bytes from `offset`. What lies beyond the end is ignored, as
    /// vm-memory's own bitmaps do: the access itself was bounds-checked before.
    #[inline]
    fn mark(&self, offset: usize, len: usize) {
        if !self.switch.is_on() {
            return;
        }
        self.mark_on(offset, len);
    }

    #[inline]
    fn mark_on(&self, offset: usize, len: usize) {
        let Some(words) = self.words.get() else {
            return; // of no pages: else who turns it on makes them first
        };
        let Some(last_byte) = len.checked_sub(1).map(|more| offset.saturating_add(more)) else {
            return;
        };
        let first = offset as u64 / PAGE_SIZE;
        let pages = last_byte as u64 / PAGE_SIZE - first + 1;
        for_each_word(
            PageRun { first, pages }.clipped(self.pages),
            |word, mask| {
                // Release pairs with the Acquire in `take`: whoever takes the bit sees the data that
                // was stored before it was set.
                if let Some(word) = words.get(word) {
                    word.fetch_or(mask, Ordering::Release);
                }
            },
        );
    }

    fn is_marked(&self, offset: usize) -> bool {
        let page = offset as u64 / PAGE_SIZE;
        // Acquire: a page seen as marked has its data.
        page < self.pages
            && self.words.get().is_some_and(|words| {
                words
                    .get((page / 64) as usize)
                    .is_some_and(|word| word.load(Ordering::Acquire) & (1 << (page % 64)) != 0)
            })
    }
}

impl DirtySource for HostWrites {
    fn pages(&self) -> u64 {
        self.0.pages
    }

    /// Never fails but for the size. Clean words are only read, so that a harvest does not steal
    /// their cache lines from the writers.
    fn take(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        fits(self.0.pages, into.pages())?;
        let Some(words) = self.0.words.get() else {
            return Ok(()); // never on, or of no pages
        };
        for (mine, word) in into.words_mut().iter_mut().zip(words) {
            // A word seen as clean may be behind; its bits are in the next harvest, together with
            // data that this harvest's copier may or may not see.
            if word.load(Ordering::Relaxed) != 0 {
                // Acquire pairs with the Release in `mark`.
                *mine |= word.swap(0, Ordering::Acquire);
            }
        }
        Ok(())
    }
}

impl<'a> WithBitmapSlice<'a> for HostWrites {
    type S = HostWritesSlice<'a>;
}

impl Bitmap for HostWrites {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.mark(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.0.is_marked(offset)
    }

    fn slice_at(&self, offset: usize) -> HostWritesSlice<'_> {
        HostWritesSlice {
            log: self,
            base: offset,
        }
    }
}

/// A log of no pages that is on; [`with_len`](NewBitmap::with_len) and [`HostWrites::new`] make useful ones.
impl Default for HostWrites {
    fn default() -> Self {
        Self::with_switch(0, Switch::on(Process)) // of no words, which need not be made
    }
}

/// What a region makes for itself, off: [`HostWritesSlice::log`] finds it, and [`start`](HostWrites::start) turns it on.
/// It takes no memory and cannot fail, of whatever length; `start` says what there is no memory for.
impl NewBitmap for HostWrites {
    fn with_len(len: usize) -> Self {
        Self::off((len as u64).div_ceil(PAGE_SIZE))
    }
}

impl fmt::Debug for HostWrites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostWrites")
            .field("pages", &self.0.pages)
            .field("on", &self.is_on())
            .finish_non_exhaustive()
    }
}

/// [`HostWrites`] seen from an offset: what a `VolatileSlice` of the region carries. A reference,
/// so that taking one costs no atomic.
#[derive(Clone, Copy)]
pub struct HostWritesSlice<'a> {
    log: &'a HostWrites,
    base: usize,
}

impl HostWritesSlice<'_> {
    /// The log that this is a slice of: how the owner of a log finds it in a region that made its
    /// own (`region.bitmap().log()`, for instance of memslots).
    pub fn log(&self) -> HostWrites {
        self.log.clone()
    }
}

impl WithBitmapSlice<'_> for HostWritesSlice<'_> {
    type S = Self;
}

impl BitmapSlice for HostWritesSlice<'_> {}

impl Bitmap for HostWritesSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.0.mark(self.base.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.0.is_marked(self.base.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            log: self.log,
            base: self.base.saturating_add(offset),
        }
    }
}

impl fmt::Debug for HostWritesSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostWritesSlice")
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}
