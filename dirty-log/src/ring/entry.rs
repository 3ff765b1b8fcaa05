// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One entry of a ring, and the cursor that takes a ring's entries in their order.

use crate::Error;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Bytes of an entry (`struct kvm_dirty_gfn`).
pub(crate) const ENTRY_BYTES: u32 = 16;

/// `KVM_DIRTY_GFN_F_DIRTY`: KVM has filled it.
const DIRTY: u32 = 1 << 0;
/// `KVM_DIRTY_GFN_F_RESET`: user space has taken it.
const RESET: u32 = 1 << 1;

/// How many entries each vCPU's ring has: a power of two from 1024 (KVM keeps 64 of them back, and on
/// hosts with page-modification logging 512 more) to 65536.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RingSize(u32);

impl RingSize {
    /// The largest that any KVM takes (`KVM_DIRTY_RING_MAX_ENTRIES`).
    pub const MAX: Self = Self(65536);

    /// A size.
    ///
    /// # Errors
    /// [`Error::RingSize`].
    pub const fn new(entries: u32) -> Result<Self, Error> {
        if entries.is_power_of_two() && entries >= 1024 && entries <= Self::MAX.0 {
            Ok(Self(entries))
        } else {
            Err(Error::RingSize { entries })
        }
    }

    /// Entries of a ring.
    pub const fn entries(self) -> u32 {
        self.0
    }

    /// Bytes of a ring.
    pub const fn bytes(self) -> u32 {
        self.0 * ENTRY_BYTES
    }
}

/// Which slot an entry is about, as KVM writes it: the slot's number in the low half, the address space
/// (x86: 1 is that of system-management mode) in the high half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotKey(pub u32);

impl SlotKey {
    /// The slot's number, without the address space.
    pub const fn slot(self) -> u16 {
        self.0 as u16
    }

    /// The address space.
    pub const fn address_space(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

/// One entry (`struct kvm_dirty_gfn`), shared with the kernel.
#[repr(C)]
#[derive(Debug, Default)]
pub struct RingEntry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<RingEntry>() == ENTRY_BYTES as usize);

impl RingEntry {
    /// What KVM does when its vCPU writes a page that is watched: for a fake, and for models. Says
    /// whether the entry was free.
    pub fn push(&self, slot: SlotKey, offset: u64) -> bool {
        // A read-modify-write, for loom: it remembers the last access to an atomic alone, and behind a load here
        // it would not see that the store below meets a load of another thread's.
        if self.flags.fetch_or(0, Ordering::Acquire) != 0 {
            return false;
        }
        self.slot.store(slot.0, Ordering::Relaxed);
        self.offset.store(offset, Ordering::Relaxed);
        // Pairs with the Acquire in `harvest`.
        self.flags.store(DIRTY, Ordering::Release);
        true
    }

    /// What `KVM_RESET_DIRTY_RINGS` does to an entry, for a fake: the page to watch again, if user space
    /// has taken the entry.
    pub fn reset(&self) -> Option<(SlotKey, u64)> {
        // Pairs with the Release in `harvest`.
        if self.flags.load(Ordering::Acquire) & RESET == 0 {
            return None;
        }
        let page = (
            SlotKey(self.slot.load(Ordering::Relaxed)),
            self.offset.load(Ordering::Relaxed),
        );
        self.flags.store(0, Ordering::Release);
        Some(page)
    }

    /// Takes the entry, if KVM has filled it.
    fn harvest(&self) -> Option<(SlotKey, u64)> {
        // Acquire pairs with KVM's release: slot and offset are there. Exactly DIRTY: an entry with
        // RESET was taken a lap ago and waits for its reset.
        if self.flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
            return None;
        }
        let page = (
            SlotKey(self.slot.load(Ordering::Relaxed)),
            self.offset.load(Ordering::Relaxed),
        );
        // Release pairs with KVM's acquire: it refills the entry after the two loads above.
        self.flags.store(RESET, Ordering::Release);
        Some(page)
    }

    fn waits_for_reset(&self) -> bool {
        // Acquire: KVM's release of the flags comes after it has read the entry for the last time.
        self.flags.load(Ordering::Acquire) & RESET != 0
    }
}

/// A ring's memory: the kernel's, mapped (`MappedRing`), or a fake's. Its length is a power of two.
pub trait RingMemory: Send {
    /// The entries.
    fn entries(&self) -> &[RingEntry];
}

impl<M: RingMemory + ?Sized> RingMemory for Box<M> {
    fn entries(&self) -> &[RingEntry] {
        (**self).entries()
    }
}

impl RingMemory for std::sync::Arc<[RingEntry]> {
    fn entries(&self) -> &[RingEntry] {
        self
    }
}

/// A ring and how far it has been taken.
pub(super) struct Cursor<M> {
    memory: M,
    /// The next entry. Runs free, masked on use.
    next: u32,
    /// Entries before `next` that were taken and may not have been reset.
    unreset: u32,
}

impl<M: RingMemory> Cursor<M> {
    pub fn new(memory: M) -> Self {
        Self {
            memory,
            next: 0,
            unreset: 0,
        }
    }

    /// Takes what is there: one lap at most, so that a fast guest keeps nobody here.
    pub fn drain(&mut self, mut each: impl FnMut(SlotKey, u64)) -> u32 {
        let entries = self.memory.entries();
        let mask = (entries.len() as u32).wrapping_sub(1);
        let mut taken = 0;
        while (taken as usize) < entries.len() {
            let at = (self.next & mask) as usize;
            let Some((slot, offset)) = entries.get(at).and_then(RingEntry::harvest) else {
                break;
            };
            each(slot, offset);
            self.next = self.next.wrapping_add(1);
            taken += 1;
        }
        self.unreset = self.unreset.saturating_add(taken);
        taken
    }

    /// How many entries were taken and not reset: 0 once the kernel has done its part. It resets in
    /// order, so the last one tells of all.
    pub fn check_reset(&mut self) -> u32 {
        let entries = self.memory.entries();
        let mask = (entries.len() as u32).wrapping_sub(1);
        while self.unreset > 0 {
            let last = (self.next.wrapping_sub(1) & mask) as usize;
            if !entries.get(last).is_some_and(RingEntry::waits_for_reset) {
                self.unreset = 0;
                break;
            }
            // Some were, if the first of them is.
            let first = (self.next.wrapping_sub(self.unreset) & mask) as usize;
            if entries.get(first).is_some_and(RingEntry::waits_for_reset) {
                break;
            }
            self.unreset -= 1;
        }
        self.unreset
    }

    /// Takes what is there in no order: of a ring that was overrun, where KVM and this cursor no longer
    /// agree on what comes next. All that is taken is KVM's to reset, if it can.
    pub fn sweep(&mut self, mut each: impl FnMut(SlotKey, u64)) -> u32 {
        let mut taken = 0;
        for (slot, offset) in self.memory.entries().iter().filter_map(RingEntry::harvest) {
            each(slot, offset);
            taken += 1;
        }
        self.unreset = 0;
        taken
    }

    /// Entries that were taken and not yet seen to be reset.
    pub fn unreset(&self) -> u32 {
        self.unreset
    }

    /// Whether all of the ring's entries were taken at once.
    pub fn is_whole_lap(&self) -> bool {
        self.unreset as usize >= self.memory.entries().len()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn ring(entries: usize) -> Arc<[RingEntry]> {
        (0..entries).map(|_| RingEntry::default()).collect()
    }

    #[test]
    fn entries_are_taken_in_order_and_once() {
        let memory = ring(8);
        let mut cursor = Cursor::new(Arc::clone(&memory));
        for lap in 0..5u64 {
            for at in 0..6 {
                assert!(memory[((lap * 6 + at) % 8) as usize].push(SlotKey(1), lap * 6 + at));
            }
            let mut seen = Vec::new();
            assert_eq!(cursor.drain(|_, offset| seen.push(offset)), 6);
            assert_eq!(seen, (lap * 6..lap * 6 + 6).collect::<Vec<_>>());
            assert_eq!(cursor.drain(|_, _| panic!("taken twice")), 0);
            assert_eq!(cursor.check_reset(), 6);
            for entry in memory.iter() {
                entry.reset();
            }
            assert_eq!(cursor.check_reset(), 0);
        }
    }

    #[test]
    fn an_entry_that_waits_for_its_reset_stops_the_lap() {
        let memory = ring(4);
        let mut cursor = Cursor::new(Arc::clone(&memory));
        memory
            .iter()
            .for_each(|entry| assert!(entry.push(SlotKey(0), 9)));
        assert_eq!(cursor.drain(|_, _| ()), 4);
        assert_eq!(cursor.drain(|_, _| ()), 0);
        // KVM did two of the four.
        memory[..2]
            .iter()
            .for_each(|entry| assert!(entry.reset().is_some()));
        assert_eq!(cursor.check_reset(), 2);
        assert!(memory[0].push(SlotKey(0), 1));
        assert_eq!(cursor.drain(|_, _| ()), 1);
        assert_eq!(cursor.check_reset(), 3);
    }

    #[test]
    fn a_size_is_a_power_of_two_that_some_kvm_takes() {
        for good in [1024, 4096, 65536] {
            assert_eq!(RingSize::new(good).unwrap().bytes(), good * 16);
        }
        for bad in [0, 1, 512, 1023, 1025, 65537, 131072, u32::MAX] {
            assert!(RingSize::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_halves_of_a_key_are_slot_and_address_space() {
        let key = SlotKey(0x0001_0203);
        assert_eq!((key.slot(), key.address_space()), (0x203, 1));
    }
}
