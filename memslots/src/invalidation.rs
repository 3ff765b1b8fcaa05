// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Invalidations`]: whether something that was derived from guest memory still holds, when memory can be taken away
//! under a slot that stays (a hole punch, a balloon, an unplug). The kernel's `mmu_invalidate_seq`,
//! `mmu_invalidate_in_progress` and range; `mmu_notifier_retry` in the header's time.
//!
//! ```text
//!   user (any thread, no lock)                 invalidator
//!   ──────────────────────────                 ───────────
//!   seq := sequence()                          begin: note the range
//!   derive: read, hash, pin, map …             wait for the readers that are inside
//!   retry(seq, range)?  yes: derive again      take the memory away
//!                       no: use it             end: sequence += 1, then the range is done with
//! ```
//!
//! What begins after the user's `sequence` and is not over at its `retry` is in progress then; what is over by then has
//! changed the number. So a `retry` that says no says: *between the two calls, nothing in this range was taken away.*
//!
//! For something that is kept, `retry` is asked before each use, **inside a guard** of the same VM's slots
//! ([`Memslots::reader`](crate::Memslots::reader)). Then its no holds until the guard is left: an invalidator looks for
//! readers after it has noted its range, and so either it finds this one inside and waits for it, or this one's look
//! comes later and finds the range. (That pair of barriers is srcu's, at `enter` and at `grace`.)

use crate::sync::{AtomicU64, Mutex, Ordering, fence, lock};
use crate::{Gfn, PAGE_SHIFT};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// The count of invalidations that a derivation began with: an answer of [`Invalidations::sequence`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InvalidationSeq(u64);

/// A VM's invalidations: see [`SlotTable::invalidations`](crate::SlotTable::invalidations).
///
/// ```
/// # use memslots::{Backing, Gfn, Memslots, SlotFlags, fake::FakeHost};
/// # use vm_memory::{Bytes, GuestAddress};
/// let memslots = Memslots::new(FakeHost::new(8));
/// let slot = memslots.create(GuestAddress(0), Backing::anonymous(0x4000), SlotFlags::NONE)?;
/// let mut reader = memslots.reader();
///
/// // Something derived from page 1 and kept: here, its first word.
/// let table = reader.enter();
/// let (seq, page) = (table.invalidations().sequence(), Gfn(1)..Gfn(2));
/// let word: u32 = table.checked().read_obj(GuestAddress(0x1000))?;
/// drop(table);
///
/// memslots.ram().punch(&[GuestAddress(0x2000)..GuestAddress(0x3000)])?; // another page
/// assert!(reader.enter().invalidations().retry(seq, page), "it is not told apart afterwards");
/// # drop(slot);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Invalidations {
    /// Those that are over.
    sequence: AtomicU64,
    /// Those that are not.
    in_progress: AtomicU64,
    /// While there are some: the hull of their ranges, in frames.
    start: AtomicU64,
    end: AtomicU64,
    /// Held while the four above are written, and by no reader.
    writing: Mutex<()>,
}

impl Invalidations {
    fn new() -> Self {
        Self {
            sequence: AtomicU64::new(0),
            in_progress: AtomicU64::new(0),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
            writing: Mutex::new(()),
        }
    }

    /// To be taken before something is derived from guest memory. Never blocks.
    pub fn sequence(&self) -> InvalidationSeq {
        // Acquire: pairs with the Release of `finish`. Who sees an invalidation's number sees memory as it left it.
        InvalidationSeq(self.sequence.load(Ordering::Acquire))
    }

    /// Whether what was derived from the frames `of` since `seq` may be wrong: an invalidation of one of them is in
    /// progress, or one of anything has ended since (`mmu_invalidate_retry_gfn`). Never blocks, and is wrong in one
    /// direction only: while several are in progress, what lies between them counts too.
    pub fn retry(&self, seq: InvalidationSeq, of: Range<Gfn>) -> bool {
        // Pairs with the fence of `begin`: what was read of guest memory before this call comes before the looks below.
        // Who has read what an invalidator left finds it noted.
        fence(Ordering::Acquire);
        // Acquire: pairs with the Release of `start` (the range before the count) and of `finish` (the sequence before
        // the count).
        if self.in_progress.load(Ordering::Acquire) != 0 {
            // Acquire, both, and the sequence after them: if one of the two is a later invalidation's already, the one
            // that we saw in progress is over, and the sequence, which was written before, tells.
            let start = self.start.load(Ordering::Acquire);
            let end = self.end.load(Ordering::Acquire);
            if of.start.0 < end && start < of.end.0 {
                return true;
            }
        }
        self.sequence() != seq
    }

    /// As [`retry`](Self::retry) for something that was derived from memory anywhere (`mmu_notifier_retry`).
    pub fn retry_any(&self, seq: InvalidationSeq) -> bool {
        // As in `retry`.
        fence(Ordering::Acquire);
        self.in_progress.load(Ordering::Acquire) != 0 || self.sequence() != seq
    }

    /// Notes that `range` is about to be taken away (`mmu_invalidate_begin`, `mmu_invalidate_range_add`), until the
    /// answer is dropped. For invalidators beside this crate's own [`punch`](crate::GuestRam::punch): they wait for the
    /// readers that are inside before they go on ([`GuestRam::invalidate`](crate::GuestRam::invalidate) does both).
    ///
    /// Blocks for another's `begin` or end only.
    pub fn begin(self: &Arc<Self>, range: Range<Gfn>) -> Invalidation {
        let writing = lock(&self.writing);
        // Relaxed loads: written under this lock alone.
        let others = self.in_progress.load(Ordering::Relaxed);
        let (start, end) = if others == 0 {
            (range.start.0, range.end.0)
        } else {
            (
                self.start.load(Ordering::Relaxed).min(range.start.0),
                self.end.load(Ordering::Relaxed).max(range.end.0),
            )
        };
        // Release, thrice: who reads a part of the range sees the ends of all invalidations before it, and who reads the
        // count sees the range. (Who must find the count finds the range by the fence below, or by srcu's barriers: no
        // model needs the third.)
        self.start.store(start, Ordering::Release);
        self.end.store(end, Ordering::Release);
        self.in_progress.store(others + 1, Ordering::Release);
        drop(writing);
        // Pairs with the fence of `retry`: the stores above come before the caller's to guest memory.
        fence(Ordering::Release);
        Invalidation {
            of: Arc::clone(self),
        }
    }

    fn finish(&self) {
        let _writing = lock(&self.writing);
        // The sequence before the count: a reader that finds nothing in progress any more must find the number changed.
        // Release: pairs with the Acquire of `sequence`.
        let sequence = self.sequence.load(Ordering::Relaxed).wrapping_add(1);
        self.sequence.store(sequence, Ordering::Release);
        let others = self.in_progress.load(Ordering::Relaxed) - 1;
        // Release: pairs with the Acquire of `retry`.
        self.in_progress.store(others, Ordering::Release);
    }
}

/// An invalidation that is in progress; dropped, it is over (`mmu_invalidate_end`).
#[must_use = "dropped, the invalidation is over"]
#[derive(Debug)]
pub struct Invalidation {
    of: Arc<Invalidations>,
}

impl Drop for Invalidation {
    fn drop(&mut self) {
        self.of.finish();
    }
}

/// The frames that `size` bytes from `start` touch.
pub(crate) fn frames(range: &Range<u64>) -> Range<Gfn> {
    let end = range.end.div_ceil(1 << PAGE_SHIFT);
    Gfn(range.start >> PAGE_SHIFT)..Gfn(end)
}

impl Default for Invalidations {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Invalidations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invalidations")
            .field("sequence", &self.sequence().0)
            .field("in_progress", &self.in_progress.load(Ordering::Acquire))
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_range_in_progress_concerns_its_own_frames_and_one_that_ended_all() {
        let all = Arc::new(Invalidations::new());
        let seq = all.sequence();
        let of = |from, to| Gfn(from)..Gfn(to);
        assert!(!all.retry(seq, of(0, u64::MAX)) && !all.retry_any(seq));
        let first = all.begin(of(10, 20));
        let frames = [
            (0, 10, false),
            (0, 11, true),
            (19, 21, true),
            (20, 30, false),
        ];
        for (from, to, retry) in frames {
            assert_eq!(all.retry(seq, of(from, to)), retry, "{from}..{to}");
        }
        assert!(all.retry_any(seq));
        let second = all.begin(of(40, 50));
        assert!(all.retry(seq, of(30, 31)), "the hull of both");
        drop(second);
        assert!(all.retry(seq, of(0, 1)), "one has ended");
        assert!(!all.retry(all.sequence(), of(0, 1)));
        assert!(all.retry(all.sequence(), of(10, 11)), "one has not");
        drop(first);
        assert!(!all.retry(all.sequence(), of(10, 11)));
        let third = all.begin(of(1, 2));
        assert!(
            !all.retry(all.sequence(), of(10, 50)),
            "the hull began anew"
        );
        drop(third);
        assert_eq!(frames_of(0x1000, 0x2fff), of(1, 3));
    }

    fn frames_of(start: u64, end: u64) -> Range<Gfn> {
        super::frames(&(start..end))
    }
}
