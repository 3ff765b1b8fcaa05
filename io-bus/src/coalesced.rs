// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Coalesced MMIO and PIO: KVM keeps writes to chosen addresses in a ring instead of leaving the
//! guest for each, and we carry them out before the exit that follows.
//!
//! The ring is one per virtual machine, a page that KVM shares with us
//! (`struct kvm_coalesced_mmio_ring`):
//!
//! ```text
//!   word   0       1      2 …                             6 words an entry
//!        +-------+------+--------------+-----+-----+-----------+---
//!        | first | last | phys_addr ×2 | len | pio | data ×2   | …     (4096 - 8) / 24 entries
//!        +-------+------+--------------+-----+-----+-----------+---
//!           ours   KVM's
//! ```
//!
//! KVM fills entry `last` and then advances `last`; we carry out entry `first` and then advance
//! `first`. Equal, they mean an empty ring, so one entry is always free. A write that finds the
//! ring full leaves the guest as if it had not been chosen; the ring is drained before it is
//! dispatched, so it still comes after those that are in it.
//!
//! # Orderings
//!
//! - KVM's write barrier before it stores `last` pairs with our Acquire load of `last`: an entry is
//!   read whole.
//! - Our Release store of `first` pairs with KVM's reading `first` before it fills the entry that
//!   was freed (it orders the two by dependency): an entry is not overwritten while we read it.
//! - `first` is advanced **after** the write was carried out, never before, and by nobody but the
//!   holder of the lock. That Release store also pairs with the Acquire load of `first` in
//!   [`Ring::is_empty`]: a vCPU that finds the ring empty finds its own writes carried out, though
//!   another thread may have done it. If `first` went ahead, that vCPU's exit could overtake them.
//!
//! # Trust
//!
//! The guest cannot reach the ring. What is read from it is bounded all the same: indices are taken
//! modulo the capacity, a length is cut to 8 bytes, and a drain ends after as many entries as the
//! ring has, whatever the words say.

use std::sync::OnceLock;

use crate::Error;
use crate::range::{BusKind, IoRange};
use crate::sync::{AtomicU32, AtomicU64, Mutex, Ordering, lock};

/// The words before the entries.
const HEADER_WORDS: usize = 2;
/// The words of one entry (`struct kvm_coalesced_mmio`).
const ENTRY_WORDS: usize = 6;
const FIRST: usize = 0;
const LAST: usize = 1;

/// The shared page of `struct kvm_coalesced_mmio_ring`, as its 32-bit words.
///
/// Implemented for [`MappedRing`](crate::MappedRing) (feature `kvm`), and for boxed words, which a
/// test fills as KVM would.
///
/// # Contract
///
/// The same words, and as many, at each call.
pub trait RingMemory: Send + Sync {
    /// All words of the page: `first`, `last`, then the entries.
    fn words(&self) -> &[AtomicU32];
}

impl RingMemory for Box<[AtomicU32]> {
    fn words(&self) -> &[AtomicU32] {
        self
    }
}

impl<T: RingMemory + ?Sized> RingMemory for std::sync::Arc<T> {
    fn words(&self) -> &[AtomicU32] {
        (**self).words()
    }
}

/// One write that KVM kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CoalescedWrite {
    /// [`BusKind::Pio`] or [`BusKind::Mmio`].
    pub(crate) bus: BusKind,
    pub(crate) address: u64,
    bytes: [u8; 8],
    len: usize,
}

impl CoalescedWrite {
    pub(crate) fn data(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// The consumer's side of the ring.
pub(crate) struct Ring {
    memory: Box<dyn RingMemory>,
    /// Held while entries are carried out; who holds it owns `first`.
    draining: Mutex<()>,
    drained: AtomicU64,
}

impl Ring {
    /// `None` if the memory has no room for two entries, of which one is always free.
    fn new(memory: Box<dyn RingMemory>) -> Option<Self> {
        let ring = Self {
            memory,
            draining: Mutex::new(()),
            drained: AtomicU64::new(0),
        };
        (ring.capacity() >= 2).then_some(ring)
    }

    /// How many entries the page has; one of them is always free.
    fn capacity(&self) -> usize {
        self.memory.words().len().saturating_sub(HEADER_WORDS) / ENTRY_WORDS
    }

    fn load(&self, word: usize, ordering: Ordering) -> u32 {
        match self.memory.words().get(word) {
            Some(word) => word.load(ordering),
            None => 0,
        }
    }

    /// Whether every write that happened before this call has been carried out.
    #[inline]
    fn is_empty(&self) -> bool {
        let [first, last, ..] = self.memory.words() else {
            return true;
        };
        // `last` before `first`: any value will do that is as new as this vCPU's own writes, which
        // its exit has brought, and `first` can reach it only by carrying them out. The other way
        // round, an old `first` could meet a `last` that has gone once around the ring since.
        // Acquire: of `last`, so that `first` is read after it; of `first`, it pairs with the Release
        // of `Advance`, see the top of this file.
        let last = last.load(Ordering::Acquire);
        first.load(Ordering::Acquire) == last
    }

    fn entry(&self, index: usize) -> CoalescedWrite {
        // Relaxed: after the Acquire of `last`, and before the Release of `first`.
        let word = |n| self.load(HEADER_WORDS + index * ENTRY_WORDS + n, Ordering::Relaxed);
        let [low, high] = [word(0), word(1)].map(u64::from);
        let data = u64::from(word(4)) | u64::from(word(5)) << 32;
        CoalescedWrite {
            // The words are read as this host's; so are KVM's fields.
            address: low | high << 32,
            bus: match word(3) {
                0 => BusKind::Mmio,
                _ => BusKind::Pio,
            },
            bytes: data.to_le_bytes(),
            len: (word(2) as usize).min(8),
        }
    }

    /// Carries out what is in the ring now, in order. What comes meanwhile waits for the next exit,
    /// so a guest that never stops writing holds nobody up.
    fn drain(&self, mut carry_out: impl FnMut(CoalescedWrite)) -> usize {
        let _draining = lock(&self.draining);
        let capacity = self.capacity();
        // Relaxed: only this lock's holders store it.
        let mut first = self.load(FIRST, Ordering::Relaxed) as usize % capacity;
        // Acquire: pairs with KVM's barrier, see the top of this file.
        let last = self.load(LAST, Ordering::Acquire) as usize % capacity;
        let mut count = 0;
        while first != last && count < capacity {
            let next = (first + 1) % capacity;
            let write = self.entry(first);
            // Also if the device panics: a write is never carried out twice.
            let _advance = Advance {
                ring: self,
                to: next as u32,
            };
            carry_out(write);
            first = next;
            count += 1;
        }
        self.drained.fetch_add(count as u64, Ordering::Relaxed);
        count
    }
}

/// Frees an entry when it is dropped.
struct Advance<'a> {
    ring: &'a Ring,
    to: u32,
}

impl Drop for Advance<'_> {
    fn drop(&mut self) {
        if let Some(first) = self.ring.memory.words().get(FIRST) {
            // Release: pairs with KVM's read and with `is_empty`, see the top of this file.
            first.store(self.to, Ordering::Release);
        }
    }
}

/// The ring of one virtual machine, once there is one, and the zones that feed it.
#[derive(Default)]
pub(crate) struct Coalescing {
    ring: OnceLock<Ring>,
    /// Held over KVM's calls too, so that the list is what KVM has.
    zones: Mutex<Vec<(BusKind, IoRange)>>,
}

impl Coalescing {
    pub(crate) fn attach(&self, memory: Box<dyn RingMemory>) -> Result<(), Error> {
        let words = memory.words().len();
        let ring = Ring::new(memory).ok_or(Error::RingTooSmall { words })?;
        self.ring.set(ring).map_err(|_| Error::RingAttached)
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.ring.get().is_none_or(Ring::is_empty)
    }

    pub(crate) fn drain(&self, carry_out: impl FnMut(CoalescedWrite)) -> usize {
        self.ring.get().map_or(0, |ring| ring.drain(carry_out))
    }

    /// How many writes have been carried out from the ring.
    pub(crate) fn drained(&self) -> u64 {
        self.ring
            .get()
            .map_or(0, |ring| ring.drained.load(Ordering::Relaxed))
    }

    pub(crate) fn zones(&self) -> Vec<(BusKind, IoRange)> {
        lock(&self.zones).clone()
    }

    /// Adds a zone with KVM's consent. `call` is made with the list locked.
    pub(crate) fn add(
        &self,
        bus: BusKind,
        range: IoRange,
        call: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        if self.ring.get().is_none() {
            return Err(Error::NoRing { bus, range });
        }
        let mut zones = lock(&self.zones);
        // KVM takes overlapping zones, but would drop one with another that lies inside it.
        if let Some((_, other)) = zones
            .iter()
            .find(|(on, zone)| *on == bus && zone.overlaps(&range))
        {
            let other = *other;
            return Err(Error::ZoneOverlap { bus, range, other });
        }
        call()?;
        zones.push((bus, range));
        Ok(())
    }

    /// Removes a zone with KVM's consent.
    pub(crate) fn remove(
        &self,
        bus: BusKind,
        range: IoRange,
        call: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut zones = lock(&self.zones);
        call()?;
        zones.retain(|zone| *zone != (bus, range));
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;
    use std::sync::Arc;

    type Words = Arc<Box<[AtomicU32]>>;

    fn page(words: usize) -> Words {
        Arc::new((0..words).map(|_| AtomicU32::new(0)).collect())
    }

    /// KVM's side, as `virt/kvm/coalesced_mmio.c` describes it.
    fn kvm_writes(words: &Words, bus: BusKind, address: u64, data: &[u8]) -> bool {
        let capacity = ((words.len() - HEADER_WORDS) / ENTRY_WORDS) as u32;
        let (first, last) = (
            words[FIRST].load(Ordering::Acquire),
            words[LAST].load(Ordering::Relaxed),
        );
        if last >= capacity || (last + 1) % capacity == first {
            return false;
        }
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let at = HEADER_WORDS + last as usize * ENTRY_WORDS;
        let low = |n: u64| n as u32;
        let entry = [
            low(address),
            low(address >> 32),
            data.len() as u32,
            u32::from(bus == BusKind::Pio),
            low(u64::from_le_bytes(bytes)),
            low(u64::from_le_bytes(bytes) >> 32),
        ];
        for (word, value) in words[at..].iter().zip(entry) {
            word.store(value, Ordering::Relaxed);
        }
        words[LAST].store((last + 1) % capacity, Ordering::Release);
        true
    }

    #[test]
    fn a_page_holds_as_many_entries_as_kvm_says() {
        let ring = Ring::new(Box::new(page(1024))).unwrap();
        assert_eq!(ring.capacity(), (4096 - 8) / 24);
        assert!(Ring::new(Box::new(page(2))).is_none());
        assert!(Ring::new(Box::new(page(2 + 11))).is_none());
        assert!(Ring::new(Box::new(page(2 + 12))).is_some());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(bool, u64, Vec<u8>),
        Drain,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (any::<bool>(), any::<u64>(), prop::collection::vec(any::<u8>(), 1..=8))
                .prop_map(|(pio, address, data)| Step::Write(pio, address, data)),
            1 => Just(Step::Drain),
        ]
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out_once_and_in_order(
            capacity in 2usize..6,
            steps in prop::collection::vec(step(), 1..80),
        ) {
            let words = page(HEADER_WORDS + capacity * ENTRY_WORDS + 3);
            let ring = Ring::new(Box::new(words.clone())).unwrap();
            let mut model: VecDeque<(BusKind, u64, Vec<u8>)> = VecDeque::new();
            let mut total = 0;
            for step in steps {
                match step {
                    Step::Write(pio, address, data) => {
                        let bus = if pio { BusKind::Pio } else { BusKind::Mmio };
                        let kept = kvm_writes(&words, bus, address, &data);
                        prop_assert_eq!(kept, model.len() < capacity - 1);
                        if kept {
                            model.push_back((bus, address, data));
                        }
                    }
                    Step::Drain => {
                        let mut out = Vec::new();
                        let count = ring.drain(|w| out.push((w.bus, w.address, w.data().to_vec())));
                        total += count as u64;
                        prop_assert_eq!(count, out.len());
                        prop_assert_eq!(out, model.drain(..).collect::<Vec<_>>());
                    }
                }
                prop_assert_eq!(ring.is_empty(), model.is_empty());
            }
            prop_assert_eq!(ring.drained.load(Ordering::Relaxed), total);
        }

        /// Words that no kernel writes: a drain ends, stays inside, and leaves an empty ring.
        #[test]
        fn hostile_words_are_bounded(
            capacity in 2usize..6,
            noise in prop::collection::vec(any::<u32>(), 40),
            first in any::<u32>(),
            last in any::<u32>(),
        ) {
            let words = page(HEADER_WORDS + capacity * ENTRY_WORDS);
            for (word, value) in words.iter().zip(noise) {
                word.store(value, Ordering::Relaxed);
            }
            words[FIRST].store(first, Ordering::Relaxed);
            words[LAST].store(last, Ordering::Relaxed);
            let ring = Ring::new(Box::new(words.clone())).unwrap();
            let count = ring.drain(|write| assert!(write.data().len() <= 8));
            prop_assert!(count < capacity);
            prop_assert_eq!(ring.drain(|_| ()), 0);
        }
    }

    #[test]
    fn a_write_whose_device_panics_is_not_carried_out_again() {
        let words = page(1024);
        let ring = Ring::new(Box::new(words.clone())).unwrap();
        for n in 0..3 {
            assert!(kvm_writes(&words, BusKind::Pio, n, &[n as u8]));
        }
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            ring.drain(|write| assert_ne!(write.address, 1, "a device's own bug"))
        }));
        assert!(panicked.is_err());
        let mut left = Vec::new();
        ring.drain(|write| left.push(write.address));
        assert_eq!(left, [2]);
    }
}
