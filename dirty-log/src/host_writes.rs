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

use std::fmt;
use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

use crate::layout::{PAGE_SIZE, for_each_word, words_for};
use crate::sync::{AtomicU64, Ordering};
use crate::{DirtyBitmap, DirtySource, Error, PageRun};

/// An atomic bitmap of the pages that this process wrote, shared by clones.
///
/// Give one clone to the memory region (`GuestRegionMmap<HostWrites>`, or `Option<HostWrites>`
/// where tracking is a choice of configuration: vm-memory's `()` and `None` cost nothing), and
/// another to a [`DirtyLog`](crate::DirtyLog). Any number of threads mark; one harvests.
///
/// ```
/// use dirty_log::{DirtyBitmap, DirtySource, HostWrites, PageRun};
/// use vm_memory::bitmap::Bitmap;
///
/// let mut writes = HostWrites::new(512);
/// writes.clone().mark_dirty(0x1ffe, 4); // what vm-memory does after a write at 0x1ffe
///
/// let mut dirty = DirtyBitmap::new(512);
/// writes.take(&mut dirty)?;
/// assert_eq!(dirty.runs().next(), Some(PageRun { first: 1, pages: 2 }));
/// # Ok::<(), dirty_log::Error>(())
/// ```
#[derive(Clone)]
pub struct HostWrites(Arc<Inner>);

struct Inner {
    words: Box<[AtomicU64]>,
    pages: u64,
}

impl HostWrites {
    /// A clean log for `pages` pages.
    pub fn new(pages: u64) -> Self {
        let words = (0..words_for(pages)).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Inner { words, pages }))
    }
}

impl Inner {
    /// Marks the pages of `len` bytes from `offset`. What lies beyond the end is ignored, as
    /// vm-memory's own bitmaps do: the access itself was bounds-checked before.
    #[inline]
    fn mark(&self, offset: usize, len: usize) {
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
                self.words[word].fetch_or(mask, Ordering::Release);
            },
        );
    }

    fn is_marked(&self, offset: usize) -> bool {
        let page = offset as u64 / PAGE_SIZE;
        // Acquire: a page seen as marked has its data.
        page < self.pages
            && self.words[(page / 64) as usize].load(Ordering::Acquire) & (1 << (page % 64)) != 0
    }
}

impl DirtySource for HostWrites {
    fn pages(&self) -> u64 {
        self.0.pages
    }

    /// Never fails but for the size. Clean words are only read, so that a harvest does not steal
    /// their cache lines from the writers.
    fn take(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        if into.pages() != self.0.pages {
            return Err(Error::SizeMismatch {
                want: self.0.pages,
                got: into.pages(),
            });
        }
        for (index, word) in self.0.words.iter().enumerate() {
            // A word seen as clean may be behind; its bits are in the next harvest, together with
            // data that this harvest's copier may or may not see.
            if word.load(Ordering::Relaxed) != 0 {
                // Acquire pairs with the Release in `mark`.
                let taken = word.swap(0, Ordering::Acquire);
                if let Some(pending) = into.word_mut(index) {
                    *pending |= taken;
                }
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

/// A log of no pages; [`with_len`](NewBitmap::with_len) and [`HostWrites::new`] make useful ones.
impl Default for HostWrites {
    fn default() -> Self {
        Self::new(0)
    }
}

impl NewBitmap for HostWrites {
    fn with_len(len: usize) -> Self {
        Self::new((len as u64).div_ceil(PAGE_SIZE))
    }
}

impl fmt::Debug for HostWrites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostWrites")
            .field("pages", &self.0.pages)
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
