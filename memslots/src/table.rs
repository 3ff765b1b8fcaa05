// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`SlotTable`]: the slots at one moment, unchanging, and translation over them. What readers get.

use crate::{Gfn, Hva, HvaError, Region, SlotId};
use std::fmt;
use std::sync::Arc;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// What the search looks at, side by side in memory.
#[derive(Clone, Copy)]
struct Entry {
    start: u64,
    size: u64,
    host: usize,
    read_only: bool,
}

/// All slots at one moment, sorted by guest address: an immutable snapshot (`kvm_memslots`).
///
/// As a [`GuestMemoryBackend`] (and so a [`GuestMemory`](vm_memory::GuestMemory)) it gives access without permissions,
/// as a loader needs it; devices take [`CheckedMemory`](crate::CheckedMemory). Whoever holds it keeps the memory of
/// its slots mapped, even of those deleted since.
pub struct SlotTable<B = ()> {
    entries: Vec<Entry>,
    regions: Vec<Arc<Region<B>>>,
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
    /// No slots.
    pub(crate) const fn new() -> Self {
        Self {
            entries: Vec::new(),
            regions: Vec::new(),
        }
    }

    /// This table without the slots `gone`, and with `added`, which overlap none that stays.
    pub(crate) fn edited(&self, gone: &[SlotId], added: Vec<Arc<Region<B>>>) -> Self {
        let stays = |region: &&Arc<Region<B>>| !gone.contains(&region.extent().id());
        let mut regions: Vec<_> = self.regions.iter().filter(stays).cloned().collect();
        regions.extend(added);
        // Nearly sorted: what stays is, and little is added.
        regions.sort_by_key(|region| region.extent().start().0);
        let entries = regions.iter().map(|region| Entry {
            start: region.extent().start().0,
            size: region.extent().size(),
            host: region.extent().host_start().0,
            read_only: region.is_read_only(),
        });
        Self {
            entries: entries.collect(),
            regions,
        }
    }

    /// The slots, by guest address (`kvm_for_each_memslot`).
    pub fn regions(&self) -> impl ExactSizeIterator<Item = &Arc<Region<B>>> {
        self.regions.iter()
    }

    /// The slot with this id (`id_to_memslot`). Looks at each slot.
    pub fn by_id(&self, id: SlotId) -> Option<&Arc<Region<B>>> {
        self.regions
            .iter()
            .find(|region| region.extent().id() == id)
    }

    /// The slot that has the address (`gfn_to_memslot`, `search_memslots`). A binary search.
    pub fn find(&self, address: GuestAddress) -> Option<&Arc<Region<B>>> {
        self.index_of(address)
            .and_then(|index| self.regions.get(index))
    }

    fn index_of(&self, address: GuestAddress) -> Option<usize> {
        let index = self
            .entries
            .partition_point(|entry| entry.start <= address.0)
            .checked_sub(1)?;
        let entry = self.entries.get(index)?;
        (address.0 - entry.start < entry.size).then_some(index)
    }

    /// Which slot has the address, and where it lies in this process.
    pub fn translate(&self, address: GuestAddress) -> Option<Translation> {
        let index = self.index_of(address)?;
        let entry = self.entries.get(index)?;
        let offset = address.0 - entry.start;
        Some(Translation {
            slot: self.regions.get(index)?.extent().id(),
            host: Hva(entry.host + offset as usize),
            writable: !entry.read_only,
            contiguous: entry.size - offset,
        })
    }

    /// Whether the guest sees memory in the frame (`kvm_is_visible_gfn`).
    pub fn is_visible(&self, gfn: Gfn) -> bool {
        gfn.address()
            .is_some_and(|address| self.index_of(address).is_some())
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

    /// Which guest address a host address is, and in which slot. Looks at each slot: there is no index by host address.
    pub fn hva_to_gpa(&self, host: Hva) -> Option<(SlotId, GuestAddress)> {
        self.regions.iter().find_map(|region| {
            let extent = region.extent();
            extent
                .guest_address(host)
                .map(|address| (extent.id(), address))
        })
    }

    /// Which frame a host address is in (`hva_to_gfn_memslot`). As [`hva_to_gpa`](Self::hva_to_gpa).
    pub fn hva_to_gfn(&self, host: Hva) -> Option<Gfn> {
        self.hva_to_gpa(host)
            .map(|(_, address)| Gfn::containing(address))
    }

    /// The bytes of all slots together.
    pub fn total_size(&self) -> u64 {
        self.entries.iter().map(|entry| entry.size).sum()
    }
}

impl<B: Bitmap> GuestMemoryBackend for SlotTable<B> {
    type R = Region<B>;

    fn num_regions(&self) -> usize {
        self.regions.len()
    }

    fn find_region(&self, addr: GuestAddress) -> Option<&Region<B>> {
        self.find(addr).map(|region| &**region)
    }

    fn iter(&self) -> impl Iterator<Item = &Region<B>> {
        self.regions.iter().map(|region| &**region)
    }
}

impl<B> fmt::Debug for SlotTable<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.regions).finish()
    }
}
