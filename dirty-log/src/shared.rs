// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What other processes wrote: a bitmap that they share, as vhost and vhost-user log.
//!
//! A back end in another process (or vhost in the kernel) writes guest memory past KVM and past
//! vm-memory. It is given a bitmap to log into: one bit for each 4 KiB of guest *physical* memory from
//! address 0, bit `n % 8` of byte `n / 8` for page `n`, set by an atomic OR (`VHOST_USER_SET_LOG_BASE`,
//! `VHOST_LOG_PAGE`). On a little-endian host that is a bit in a `u64` as well.
//!
//! A slot begins anywhere in it, and so in the middle of a word: [`SharedSource`] is a slot's window,
//! which takes its own bits and leaves its neighbours'.
//!
//! # Trust
//! Who shares the bitmap can set any bit and clear any bit. The first costs a page sent too much, the
//! second loses that process's own writes, as if it did not log; neither reaches beyond the bitmap.
//! What a peer must not do is make it smaller, which would be a SIGBUS here: `SharedLog` seals it.

use std::fmt;
use std::sync::Arc;
// Not loom's: the other side is another process.
use std::sync::atomic::{AtomicU64, Ordering};

use memslots::SlotExtent;

use crate::layout::{WORD_BITS, words_for};
use crate::source::fits;
use crate::{DirtyBitmap, DirtySource, Error};

#[cfg(target_endian = "big")]
compile_error!("a shared log is bytes: a word of it is read as one on little-endian hosts alone");

/// The words of a bitmap that is shared: `SharedLog`'s, or a test's.
pub trait SharedWords: Send + Sync {
    /// One bit a guest frame, from frame 0.
    fn words(&self) -> &[AtomicU64];
}

impl SharedWords for Vec<AtomicU64> {
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

impl<T: SharedWords + ?Sized> SharedWords for Arc<T> {
    fn words(&self) -> &[AtomicU64] {
        (**self).words()
    }
}

/// One slot's window of a shared bitmap.
///
/// ```
/// use std::sync::{Arc, atomic::{AtomicU64, Ordering}};
/// use dirty_log::{DirtyLog, SharedSource};
/// # use memslots::{Hva, SlotExtent, SlotId};
/// # use vm_memory::GuestAddress;
/// # let slot = unsafe { SlotExtent::new(SlotId(0), GuestAddress(0x3_0000), 0x4_0000, Hva(0x1000)) }.unwrap();
/// // A slot of 64 pages from frame 0x30, and a back end that writes frame 0x41.
/// let shared: Arc<Vec<AtomicU64>> = Arc::new((0..2).map(|_| AtomicU64::new(0)).collect());
/// let mut log = DirtyLog::new(slot.clone(), SharedSource::new(shared.clone(), &slot)?)?;
/// shared[1].fetch_or(1 << 1, Ordering::Release);
/// let harvest = log.harvest()?;
/// assert_eq!(harvest.runs().next().map(|run| run.first), Some(0x11));
/// # harvest.commit();
/// # Ok::<(), dirty_log::Error>(())
/// ```
pub struct SharedSource {
    log: Arc<dyn SharedWords>,
    first: u64,
    pages: u64,
}

impl SharedSource {
    /// The window of `slot`.
    ///
    /// # Errors
    /// [`Error::BeyondShared`] where the slot does not lie in what the bitmap covers.
    pub fn new(log: Arc<impl SharedWords + 'static>, slot: &SlotExtent) -> Result<Self, Error> {
        let (first, pages) = (slot.first_gfn().0, slot.pages());
        let frames = log.words().len() as u64 * WORD_BITS;
        match first.checked_add(pages) {
            Some(end) if end <= frames => Ok(Self { log, first, pages }),
            end => Err(Error::BeyondShared {
                slot: slot.id(),
                end: end.unwrap_or(u64::MAX),
                frames,
            }),
        }
    }
}

impl DirtySource for SharedSource {
    fn pages(&self) -> u64 {
        self.pages
    }

    /// Never fails but for the size. Clean words are only read, so that a harvest does not steal their
    /// cache lines from the writers.
    fn take(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        fits(self.pages, into.pages())?;
        let shift = self.first % WORD_BITS;
        let end = self.first + self.pages;
        let words = self
            .log
            .words()
            .get((self.first / WORD_BITS) as usize..words_for(end))
            .unwrap_or_default();
        // Of the first and the last word a part is the neighbours'.
        let head = u64::MAX << shift;
        let tail = u64::MAX >> ((WORD_BITS - end % WORD_BITS) % WORD_BITS);
        let last = words.len().wrapping_sub(1);
        let mine = into.words_mut();
        for (at, word) in words.iter().enumerate() {
            let mut mask = if at == 0 { head } else { u64::MAX };
            if at == last {
                mask &= tail;
            }
            if word.load(Ordering::Relaxed) & mask == 0 {
                continue;
            }
            // Acquire pairs with the release of the process that set it (vhost-user: an atomic OR after
            // the data): a bit taken has its data.
            let taken = word.fetch_and(!mask, Ordering::Acquire) & mask;
            // Bit 0 of the slot is bit `shift` of the first word.
            if let Some(mine) = mine.get_mut(at) {
                *mine |= taken >> shift;
            }
            if shift != 0
                && let Some(mine) = at.checked_sub(1).and_then(|before| mine.get_mut(before))
            {
                *mine |= taken << (WORD_BITS - shift);
            }
        }
        Ok(())
    }
}

impl fmt::Debug for SharedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedSource")
            .field("first", &self.first)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}
