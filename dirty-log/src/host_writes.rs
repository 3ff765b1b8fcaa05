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
//! # On and off
//! A log that is off costs a load of a byte that nobody writes, a branch, and no memory. Turning it on
//! while devices write meets the same reordering: a writer stores the data, looks, and sees "off",
//! while its store still waits; who turned it on then copies the page without the data, and nobody
//! knows. So both sides need a full barrier between their store and their look:
//!
//! ```text
//!   writer                        who turns it on
//!   data := new                   state := on
//!   LIGHT ──────────────┐  ┌───── HEAVY
//!   look at the state   └──┘      copy the data
//! ```
//!
//! The heavy half is `membarrier(2)`, which has every CPU that runs this process execute the light
//! one, so that the writers need a compiler's fence alone (the `srcu` crate has the whole argument).
//! Where there is no `membarrier`, or the crate is built without the feature `kvm`, the state says so,
//! and a writer that finds the log off executes the fence itself.

use std::fmt;
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

use crate::barrier;
use crate::layout::{PAGE_SIZE, for_each_word, words_for};
use crate::source::fits;
use crate::sync::{AtomicU8, AtomicU64, Ordering, compiler_fence, fence};
use crate::{DirtyBitmap, DirtySource, Error, PageRun};

/// Writers mark.
const ON: u8 = 0;
/// Writers do not mark; who turns it on makes their barrier happen.
const OFF: u8 = 1;
/// Writers do not mark, and execute the barrier themselves before they believe it.
const OFF_FENCED: u8 = 2;

/// An atomic bitmap of the pages that this process wrote, shared by clones.
///
/// Give one clone to the memory region (`GuestRegionMmap<HostWrites>`), and another to a
/// [`DirtyLog`](crate::DirtyLog). Any number of threads mark; one harvests. It is turned on and off
/// while they do ([`start`](Self::start), [`stop`](Self::stop)).
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
    state: AtomicU8,
    /// Made when the log is first on.
    words: OnceLock<Box<[AtomicU64]>>,
    pages: u64,
}

impl HostWrites {
    /// A clean log for `pages` pages that is on.
    pub fn new(pages: u64) -> Self {
        let log = Self::in_state(pages, ON);
        log.0.words();
        log
    }

    /// A log for `pages` pages that is off: [`start`](Self::start) turns it on. Takes no memory until
    /// then.
    pub fn off(pages: u64) -> Self {
        Self::in_state(pages, off_state())
    }

    fn in_state(pages: u64, state: u8) -> Self {
        Self(Arc::new(Inner {
            state: AtomicU8::new(state),
            words: OnceLock::new(),
            pages,
        }))
    }

    /// Turns the log on, for all clones. When it returns, each write whose data are not yet visible to
    /// the caller will be marked: copy what was there before *after* this call. One that is on stays
    /// so. Allocates the bitmap the first time; interrupts this process's running threads for some
    /// microseconds (`membarrier(2)`).
    ///
    /// # Errors
    /// [`Error::Barrier`] where the kernel refuses a `membarrier` that it granted before (a seccomp
    /// filter that came later): the log is off then.
    pub fn start(&self) -> Result<(), Error> {
        let inner = &*self.0;
        inner.words();
        // AcqRel: the words are there for whoever sees ON, and of two who start at once each goes on to
        // its own barrier, since the state that it needs one for is not known to the second.
        let before = inner.state.swap(ON, Ordering::AcqRel);
        // Pairs with the fences in `Inner::is_on`.
        fence(Ordering::SeqCst);
        if let Err(source) = barrier::heavy() {
            if before == ON {
                return Ok(()); // and whoever turned it on has the barrier
            }
            if before == OFF {
                inner.state.store(OFF_FENCED, Ordering::Release);
                return Err(Error::Barrier { source });
            }
            // OFF_FENCED: the writers have executed theirs.
        }
        Ok(())
    }

    /// Turns the log off, for all clones. What is marked stays until it is taken, and writers that are
    /// in the middle of a write may mark it still.
    pub fn stop(&self) {
        // Release: nothing is ordered by it but what a writer would mark anyway.
        self.0.state.store(off_state(), Ordering::Release);
    }

    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.0.state.load(Ordering::Relaxed) == ON
    }
}

fn off_state() -> u8 {
    if barrier::is_asymmetric() {
        OFF
    } else {
        OFF_FENCED
    }
}

impl Inner {
    fn words(&self) -> &[AtomicU64] {
        self.words.get_or_init(|| {
            (0..words_for(self.pages))
                .map(|_| AtomicU64::new(0))
                .collect()
        })
    }

    /// Whether a write that was made must be marked.
    #[inline(always)]
    fn is_on(&self) -> bool {
        // The processor's barrier, where one is needed, comes from `start` (see the module).
        compiler_fence(Ordering::SeqCst);
        // Acquire, free on x86: who sees ON has the words.
        match self.state.load(Ordering::Acquire) {
            ON => true,
            OFF => false,
            _ => self.is_on_after_fence(),
        }
    }

    #[cold]
    fn is_on_after_fence(&self) -> bool {
        // Pairs with the fence in `start`: of this writer's data and that state, one is seen.
        fence(Ordering::SeqCst);
        self.state.load(Ordering::Acquire) == ON
    }

    /// Marks the pages of `len` bytes from `offset`. What lies beyond the end is ignored, as
    /// vm-memory's own bitmaps do: the access itself was bounds-checked before.
    #[inline]
    fn mark(&self, offset: usize, len: usize) {
        if !self.is_on() {
            return;
        }
        self.mark_on(offset, len);
    }

    #[inline]
    fn mark_on(&self, offset: usize, len: usize) {
        let Some(words) = self.words.get() else {
            return; // not reached: who turns it on makes them first
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
            return Ok(()); // never on
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

/// A log of no pages; [`with_len`](NewBitmap::with_len) and [`HostWrites::new`] make useful ones.
impl Default for HostWrites {
    fn default() -> Self {
        Self::new(0)
    }
}

/// What a region makes for itself, off: [`HostWritesSlice::log`] finds it, and [`start`](HostWrites::start) turns it on.
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
