// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`SlotTable`]: the slots at one moment, unchanging, and translation over them. What readers get.

use crate::found::Found;
use crate::invalidation::Invalidations;
use crate::ordered::Ordered;
use crate::region::Entry;
use crate::{CheckedView, Gfn, Hva, HvaError, PAGE_SIZE, Region, SlotId};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// All slots at one moment, sorted by guest address: an immutable snapshot (`kvm_memslots`).
///
/// As a [`GuestMemoryBackend`] (and so a [`GuestMemory`](vm_memory::GuestMemory)) it gives access without permissions,
/// as a loader needs it; devices take [`CheckedMemory`](crate::CheckedMemory), or [`checked`](Self::checked). Whoever
/// holds it keeps the memory of its slots mapped, even of those deleted since.
///
/// A lookup, by guest address, id or host address, takes two steps however many slots there are, unless they lie in
/// crowds far from each other: then a binary search goes on in the crowd. Tables share what did not change from one to
/// the next.
pub struct SlotTable<B = ()> {
    by_guest: Ordered<Entry, Arc<Region<B>>>,
    /// Id to guest address.
    by_id: Ordered<u64>,
    /// Host address to guest address. `None` once two slots have shared host memory, as parts of one mapping and memory
    /// that a caller brings along may: then every slot is looked at.
    by_host: Option<Ordered<u64>>,
    /// Like no other table's of this process; 0 for those without slots.
    serial: u64,
    /// One for all tables of a VM.
    invalidations: Arc<Invalidations>,
}

/// The place of a guest address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The slot that has it.
    pub slot: SlotId,
    /// Where it is in this process.
    pub host: Hva,
    /// Whether it may be written.
    pub writable: bool,
    /// How many bytes follow in the same slot, this one included.
    pub contiguous: u64,
}

impl<B> SlotTable<B> {
    /// No slots, of a VM that has had none yet.
    pub(crate) fn new() -> Self {
        Self {
            by_guest: Ordered::new(),
            by_id: Ordered::new(),
            by_host: Some(Ordered::new()),
            serial: 0,
            invalidations: Arc::default(),
        }
    }

    /// This table without the slots `gone`, and with `added`, which overlap none that stays. Costs what
    /// [`Ordered::edited`] does, three times.
    pub(crate) fn edited(&self, gone: &[SlotId], added: Vec<Arc<Region<B>>>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let gone: Vec<_> = gone.iter().filter_map(|id| self.by_id(*id)).collect();
        let start = |region: &Region<B>| region.extent().start().0;
        let host = |region: &Region<B>| region.extent().host_start().0 as u64;
        let id = |region: &Region<B>| u64::from(region.extent().id().0);
        // What goes and what comes, under each of the three keys.
        let goes = |key: &dyn Fn(&Region<B>) -> u64| {
            let mut keys: Vec<_> = gone.iter().map(|region| key(region)).collect();
            keys.sort_unstable();
            keys
        };
        let comes = |key: &dyn Fn(&Region<B>) -> u64| {
            let new = added.iter().map(|new| (key(new), start(new), ()));
            let mut entries: Vec<_> = new.collect();
            entries.sort_unstable();
            entries
        };
        let (gone_ids, gone_hosts, gone_starts) = (goes(&id), goes(&host), goes(&start));
        let (ids, hosts) = (comes(&id), comes(&host));
        let mut entries: Vec<_> = added
            .into_iter()
            .map(|new| (start(&new), Entry::new(&new), new))
            .collect();
        entries.sort_unstable_by_key(|(start, ..)| *start);
        let by_guest = self.by_guest.edited(&gone_starts, entries);
        let size = |start| by_guest.get(start).map_or(0, |hit| hit.hot.size());
        let by_host = match &self.by_host {
            Some(index) => host_index(index, &gone_hosts, hosts, size),
            // No slot is left that could be in another's way.
            None if by_guest.len() == 0 => Some(Ordered::new()),
            None => None,
        };
        Self {
            serial: match by_guest.len() {
                0 => 0,
                // Relaxed: only that no two are alike.
                _ => NEXT.fetch_add(1, Ordering::Relaxed),
            },
            by_guest,
            by_id: self.by_id.edited(&gone_ids, ids),
            by_host,
            invalidations: Arc::clone(&self.invalidations),
        }
    }

    /// The slots, by guest address (`kvm_for_each_memslot`).
    pub fn regions(&self) -> impl ExactSizeIterator<Item = &Arc<Region<B>>> {
        Exactly {
            left: self.by_guest.len(),
            inner: self.by_guest.iter().map(|(_, _, region)| region),
        }
    }

    /// The slot with this id (`id_to_memslot`).
    pub fn by_id(&self, id: SlotId) -> Option<&Arc<Region<B>>> {
        let start = *self.by_id.get(u64::from(id.0))?.hot;
        self.by_guest.get(start)?.cold()
    }

    /// The slot that has the address (`gfn_to_memslot`, `search_memslots`).
    #[inline(always)]
    pub fn find(&self, address: GuestAddress) -> Option<&Arc<Region<B>>> {
        self.lookup(address)?.region()
    }

    #[inline(always)]
    pub(crate) fn lookup(&self, address: GuestAddress) -> Option<Found<'_, B>> {
        let hit = self.by_guest.candidate(address.0)?;
        let entry = *hit.hot;
        // If even the first slot is above, this wraps, and is beyond the end of any: none ends at 2^64.
        let offset = address.0.wrapping_sub(hit.key);
        (offset < entry.size()).then_some(Found { hit, entry, offset })
    }

    #[inline]
    pub(crate) const fn serial(&self) -> u64 {
        self.serial
    }

    /// Which slot has the address, and where it lies in this process. A thread that asks about one slot many times over
    /// keeps a [`SlotHint`](crate::SlotHint).
    #[inline]
    pub fn translate(&self, address: GuestAddress) -> Option<Translation> {
        self.lookup(address).map(|found| found.translation())
    }

    /// Access with permissions: a device's view, without a reference to be counted.
    pub const fn checked(&self) -> CheckedView<'_, B> {
        CheckedView::new(self)
    }

    /// What tells whether something that was derived from guest memory still holds
    /// (`mmu_invalidate_seq` and its kin).
    pub fn invalidations(&self) -> &Arc<Invalidations> {
        &self.invalidations
    }

    /// The size of the host's pages behind a frame, in bytes; [`PAGE_SIZE`] where there is no slot
    /// (`kvm_host_page_size`).
    pub fn host_page_size(&self, gfn: Gfn) -> u64 {
        gfn.address()
            .and_then(|address| self.find(address))
            .map_or(PAGE_SIZE, |region| region.page_size())
    }

    /// The bytes of this process that the table takes up, [`Region`]s and what it shares with other tables included;
    /// not the guest's memory.
    pub fn memory(&self) -> usize {
        // Each region and its bitmap's reference, with the two counters of an `Arc`.
        let regions = self.by_guest.len() * (size_of::<Region<B>>() + 2 * size_of::<usize>());
        let by_host = self.by_host.as_ref().map_or(0, Ordered::memory);
        size_of::<Self>() + self.by_guest.memory() + self.by_id.memory() + by_host + regions
    }

    /// Whether the guest sees memory in the frame (`kvm_is_visible_gfn`).
    pub fn is_visible(&self, gfn: Gfn) -> bool {
        gfn.address()
            .is_some_and(|address| self.lookup(address).is_some())
    }

    /// The host address of a frame that is to be written (`gfn_to_hva`).
    ///
    /// # Errors
    /// [`HvaError::Bad`] where there is no slot, [`HvaError::ReadOnly`] where it is read-only.
    pub fn gfn_to_hva(&self, gfn: Gfn) -> Result<Hva, HvaError> {
        match self.gfn_to_hva_prot(gfn)? {
            (host, true) => Ok(host),
            (_, false) => Err(HvaError::ReadOnly),
        }
    }

    /// The host address of a frame that is to be read, and whether it may be written too (`gfn_to_hva_prot`).
    ///
    /// # Errors
    /// [`HvaError::Bad`] where there is no slot.
    pub fn gfn_to_hva_prot(&self, gfn: Gfn) -> Result<(Hva, bool), HvaError> {
        let found = gfn
            .address()
            .and_then(|address| self.translate(address))
            .ok_or(HvaError::Bad)?;
        Ok((found.host, found.writable))
    }

    /// Which guest address a host address is, and in which slot. Two lookups; where slots share host memory
    /// ([parts](crate::Backing::part) of one mapping, or what a caller brings along), each slot is looked at, and the
    /// lowest guest address answers.
    pub fn hva_to_gpa(&self, host: Hva) -> Option<(SlotId, GuestAddress)> {
        let extent = match &self.by_host {
            Some(index) => {
                let start = *index.floor(host.0 as u64)?.hot;
                self.by_guest.get(start)?.cold()?.extent()
            }
            None => self
                .regions()
                .map(|region| region.extent())
                .find(|extent| extent.guest_address(host).is_some())?,
        };
        Some((extent.id(), extent.guest_address(host)?))
    }

    /// Which frame a host address is in (`hva_to_gfn_memslot`). As [`hva_to_gpa`](Self::hva_to_gpa).
    pub fn hva_to_gfn(&self, host: Hva) -> Option<Gfn> {
        self.hva_to_gpa(host)
            .map(|(_, address)| Gfn::containing(address))
    }

    /// The bytes of all slots together.
    pub fn total_size(&self) -> u64 {
        self.by_guest.iter().map(|(_, entry, _)| entry.size()).sum()
    }
}

/// The index by host address, edited; `None` if two slots share host memory. `size` tells a slot's by its guest address.
fn host_index(
    index: &Ordered<u64>,
    gone: &[u64],
    added: Vec<(u64, u64, ())>,
    size: impl Fn(u64) -> u64,
) -> Option<Ordered<u64>> {
    let is_taken = |host: u64| index.get(host).is_some() && gone.binary_search(&host).is_err();
    if added.windows(2).any(|pair| pair[0].0 == pair[1].0)
        || added.iter().any(|(host, ..)| is_taken(*host))
    {
        return None;
    }
    let ranges: Vec<_> = added
        .iter()
        .map(|(host, start, ())| *host..*host + size(*start))
        .collect();
    let next = index.edited(gone, added);
    let is_alone = |range: &Range<u64>| {
        let below = range.start.checked_sub(1).and_then(|key| next.floor(key));
        let last = next.floor(range.end - 1);
        below.is_none_or(|hit| hit.key + size(*hit.hot) <= range.start)
            && last.is_some_and(|hit| hit.key == range.start)
    };
    ranges.iter().all(is_alone).then_some(next)
}

/// An iterator whose length is known.
struct Exactly<I> {
    inner: I,
    left: usize,
}

impl<I: Iterator> Iterator for Exactly<I> {
    type Item = I::Item;

    fn next(&mut self) -> Option<I::Item> {
        self.left = self.left.saturating_sub(1);
        self.inner.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<I: Iterator> ExactSizeIterator for Exactly<I> {}

impl<B: Bitmap> GuestMemoryBackend for SlotTable<B> {
    type R = Region<B>;

    fn num_regions(&self) -> usize {
        self.by_guest.len()
    }

    #[inline]
    fn find_region(&self, addr: GuestAddress) -> Option<&Region<B>> {
        self.find(addr).map(|region| &**region)
    }

    fn iter(&self) -> impl Iterator<Item = &Region<B>> {
        self.regions().map(|region| &**region)
    }
}

impl<B> fmt::Debug for SlotTable<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.regions()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_host_memory_is_noticed_wherever_it_overlaps() {
        let at = |host: u64, guest: u64| (host, guest, ());
        // Every slot has four bytes.
        let none = Ordered::new();
        let index = host_index(&none, &[], vec![at(10, 0), at(20, 4)], |_| 4).unwrap();
        for (host, alone) in [
            (6, true),
            (7, false),
            (10, false),
            (13, false),
            (14, true),
            (17, false),
            (24, true),
        ] {
            let next = host_index(&index, &[], vec![at(host, 8)], |_| 4);
            assert_eq!(next.is_some(), alone, "{host}");
        }
        assert!(host_index(&none, &[], vec![at(5, 0), at(5, 4)], |_| 4).is_none());
        let replaced = host_index(&index, &[10], vec![at(10, 8)], |_| 4).unwrap();
        assert_eq!(replaced.get(10).map(|hit| *hit.hot), Some(8));
    }
}
